"""Names of the formats that weights can be quantised to, in options and reports.

Nothing is imported here, so that `moezoo --help` can list them without torch.
"""

FP8, INT8, INT4, MXFP4 = "fp8_w8a8", "int8_w8a16", "int4_w4a16", "mxfp4"

QUANTIZATIONS = (FP8, INT8, INT4, MXFP4)
"""The names, from the most exact format to the least."""
