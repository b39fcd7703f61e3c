"""The nouns that every other folder shares: errors, layouts, trees and paths, adapters, stored weights."""
