"""The report: one HTML page that shows what quantization did to each layer, and needs neither network nor server."""

from onnxslim_ptq.reporting.facts import gather_facts
from onnxslim_ptq.reporting.page import render_page, write_report

__all__ = ["gather_facts", "render_page", "write_report"]
