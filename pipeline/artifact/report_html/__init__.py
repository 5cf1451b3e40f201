"""report.html: what a job cost and won, on one page that needs nothing beside itself."""

from counterweight.pipeline.artifact.report_html.page import render

__all__ = ["render"]
