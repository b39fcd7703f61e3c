"""What people read: tables of a model and its adapters."""

from lorax_fn.report.interference import Interference as Interference
from lorax_fn.report.interference import interference as interference
