"""Jobs as records in an object store; whoever submits, drives, watches or cancels one reads and writes these alone.

    _jobs/limits.json                   how many jobs may run at once (`queue.Limits`)
    _jobs/<id>/job.json                 created once: manifest, tenant, priority (`record`)
    _jobs/<id>/journal/0001.json, ...   created once each, without gaps: leased, cancel, ended (`journal`)
    _jobs/<id>/beats/0001.json          written again by the holder of lease 1 as long as it lives (`lease`)
    _batches/<id>/batch.json            created once: jobs that were asked for together (`batch`)
    _schedules/<id>/...                 batches that are asked for again and again (`schedule`)
    _logs/<id>/0001/00001.log, ...      what `counterweight run` said under lease 1 (`pipeline.segments`)

The journal is the only thing that decides. An entry is appended by creating the next number: of several writers one wins, and
the others read again and ask anew whether their entry still makes sense. So a job is never driven under two leases, an end is
never taken back, and compare-and-swap needs nothing of a store but an atomic create. A job's state is computed from its
journal, its last beat and the store's clock (`job.fold`), and stored nowhere.

What a job does is the command `counterweight run` in a process of its own (`attempt`): its exit code and its last line on
stderr are the cause of the job's end. This package adds who runs it, when, and what the others see of it. No torch is imported
here.
"""
