"""Artifacts in other people's inference engines: what an engine needs of one (`artifact`), its tensors while they are read
(`intake`), a layer as it is served (`served`), its parts over tensor-parallel ranks (`shards`); below, one folder an engine.
Nothing here imports Ray, boto3 or datasets."""
