# Against a provider that is made up: nothing is asked of AWS.
mock_provider "aws" {}

variables {
  bucket = "models"
  trust  = { worker = "{}", reader = "{}" }
}

run "bucket" {
  command = apply # some values are known behind it alone

  assert {
    condition = jsonencode([for rule in aws_s3_bucket_lifecycle_configuration.this.rule : {
      prefix  = one(rule.filter).prefix
      abort   = one(rule.abort_incomplete_multipart_upload[*].days_after_initiation)
      old     = one(rule.noncurrent_version_expiration[*].noncurrent_days)
      current = one([for one in rule.expiration : one.days if coalesce(one.days, 0) > 0])
      }]) == jsonencode([
      { prefix = "", abort = 7, old = null, current = null },
      { prefix = "", abort = null, old = 30, current = null },
      { prefix = "_work/", abort = null, old = 1, current = null },
    ])
    error_message = "Uploads are aborted, old versions go, and no current object does."
  }

  assert {
    condition     = aws_s3_bucket_versioning.this.versioning_configuration[0].status == "Enabled" && !aws_s3_bucket.this.force_destroy
    error_message = "What is deleted can be had back."
  }

  assert {
    condition     = toset(keys(aws_iam_role_policy.this)) == toset(["reader", "worker"]) && length(aws_iam_instance_profile.worker) == 1
    error_message = "Each role that is trusted exists, and instances get the worker's."
  }
}

run "nobody_but_who_is_trusted" {
  command = plan
  variables {
    trust = { reader = "{}" }
  }
  assert {
    condition     = keys(aws_iam_role.this) == ["reader"] && output.instance_profile == null
    error_message = "A role without a trust policy does not exist."
  }
}
