# What may be done with the bucket and what becomes of its objects, as values. No provider is needed here, so that
# `terraform test` runs anywhere.

terraform {
  required_version = ">= 1.7"
}

variable "bucket" {
  type        = string
  description = "Name of the bucket."
  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", var.bucket))
    error_message = "bucket: 3 to 63 lower-case letters, digits, dots and hyphens."
  }
}

variable "outputs" {
  type        = list(string)
  description = "Where in the bucket jobs write: prefixes that end in /, or \"\" for its root."
  default     = [""]
  validation {
    condition     = length(var.outputs) > 0 && alltrue([for one in var.outputs : one == "" || endswith(one, "/")])
    error_message = "outputs: at least one; each \"\" or ending in /."
  }
}

locals {
  # Which request of the code needs which action is in actions.json; tests/infra compares it with the code.
  actions = jsondecode(file("${path.module}/actions.json"))
  arn     = "arn:aws:s3:::${var.bucket}"

  policies = {
    for role, allowed in local.actions : role => jsonencode({
      Version = "2012-10-17"
      Statement = [
        {
          Sid      = "Bucket"
          Effect   = "Allow"
          Action   = allowed.bucket
          Resource = local.arn
        },
        {
          Sid      = "Objects"
          Effect   = "Allow"
          Action   = allowed.object
          Resource = "${local.arn}/*"
        },
      ]
    })
  }

  # No rule lets a current object expire: what may go is for `counterweight prune` to know, which sees who refers to what.
  lifecycle = concat(
    [
      # As old as what `prune` takes for abandoned by default.
      { id = "abort-uploads", prefix = "", abort_days = 7, noncurrent_days = null },
      # What was deleted or written over can be had back for so long.
      { id = "old-versions", prefix = "", abort_days = null, noncurrent_days = 30 },
    ],
    # Work in progress is large, is deleted all the time, and can be computed again.
    [
      for index, output in var.outputs :
      { id = "old-versions-of-work-${index}", prefix = "${output}_work/", abort_days = null, noncurrent_days = 1 }
    ],
  )
}

output "policies" {
  description = "IAM policy documents by role: worker (drivers and workers) and reader (who pulls artifacts)."
  value       = local.policies
}

output "lifecycle" {
  description = "Rules: id, prefix, abort_days of unfinished uploads, noncurrent_days of versions that are not current."
  value       = local.lifecycle
}
