"""Steps of a recipe, one file each: what a manifest can ask, and the hooks that workers and `plan` call.

The mathematics lies in `workers/quantization`, `compensation`, `transforms` and `tuning`. A hook imports it, and torch with it,
when it is called, so that a manifest is checked without them.
"""
