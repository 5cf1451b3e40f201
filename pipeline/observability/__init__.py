"""What the outside is told: readers of events and of records, and nothing else. Without them a job runs the same.

`run_metrics` and `store_metrics` are Prometheus', `spans` OpenTelemetry's, `tracking` MLflow's, each through its own library
(`counterweight[observability]`, `counterweight[mlflow]`); `sinks` says which of them a run has.
"""
