"""The tasks of the data plane, one a file: what is asked, the key of what determines the result, the record of what was found,
and how it is computed. Heavy modules are imported where they compute: the driver makes tasks, workers run them."""
