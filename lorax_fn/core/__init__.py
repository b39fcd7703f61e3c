"""The nouns that all folders share: errors, layouts, trees and paths, adapters, stored weights."""
