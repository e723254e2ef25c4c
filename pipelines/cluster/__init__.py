"""One extraction on many processes and machines, distributed by Dask.

The client plans, creates the runs and sends blocks; workers compute and commit them. `featstore.pipelines.extract`
is what joins both.
"""
