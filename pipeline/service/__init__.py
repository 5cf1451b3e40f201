"""The service: jobs, batches, schedules and artifacts over HTTP, as an API (`/v1`) and as pages for people.

It holds nothing: every answer is computed from the job store (`pipeline.jobs`), and every change is written there. So any
number of instances run side by side, and each may be killed at any moment. What an instance keeps for itself are counters that
bound how much one token or one peer may ask of it (`throttle`).

Of what users name it opens the events and artifacts of jobs below the roots that it was given (`roots`), and nothing else;
models and texts are read by workers alone.

FastAPI, uvicorn and Jinja come with `counterweight[service]`; only `serve` imports this package.
"""
