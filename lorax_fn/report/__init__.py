"""Tables, and pictures of sweeps and adapters, for people to read."""

from lorax_fn.report.interference import Interference as Interference
from lorax_fn.report.interference import interference as interference
from lorax_fn.report.page import page as page
from lorax_fn.report.plots import plot_curves as plot_curves
from lorax_fn.report.plots import plot_heatmap as plot_heatmap
from lorax_fn.report.plots import plot_metric as plot_metric
from lorax_fn.report.plots import plot_spectra as plot_spectra
