# A bucket for artifacts, jobs and work, and identities that may do with it what the code does, and no more.

terraform {
  required_version = ">= 1.7"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.70, < 7.0"
    }
  }
}

variable "bucket" {
  type        = string
  description = "Name of the bucket, unique in the world."
}

variable "outputs" {
  type        = list(string)
  description = "Where in the bucket jobs write: prefixes that end in /, or \"\" for its root."
  default     = [""]
}

variable "trust" {
  type        = map(string)
  description = "By role (worker, reader): the trust policy (JSON) that says who may assume it: instances, a cluster's workload identity."
}

provider "aws" {}

module "policy" {
  source  = "./policy"
  bucket  = var.bucket
  outputs = var.outputs
}

resource "aws_s3_bucket" "this" {
  bucket        = var.bucket
  force_destroy = false # a bucket with objects in it is not destroyed
}

resource "aws_s3_bucket_public_access_block" "this" {
  bucket                  = aws_s3_bucket.this.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_ownership_controls" "this" {
  bucket = aws_s3_bucket.this.id
  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

# Keys of S3's own: with KMS each role would need kms:GenerateDataKey and kms:Decrypt too.
resource "aws_s3_bucket_server_side_encryption_configuration" "this" {
  bucket = aws_s3_bucket.this.id
  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

# On: an artifact that somebody deletes can be had back. What work in progress leaves behind goes after a day (policy/main.tf).
resource "aws_s3_bucket_versioning" "this" {
  bucket = aws_s3_bucket.this.id
  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "this" {
  bucket     = aws_s3_bucket.this.id
  depends_on = [aws_s3_bucket_versioning.this]

  dynamic "rule" {
    for_each = module.policy.lifecycle
    content {
      id     = rule.value.id
      status = "Enabled"
      filter {
        prefix = rule.value.prefix
      }
      dynamic "abort_incomplete_multipart_upload" {
        for_each = rule.value.abort_days[*]
        content {
          days_after_initiation = abort_incomplete_multipart_upload.value
        }
      }
      dynamic "noncurrent_version_expiration" {
        for_each = rule.value.noncurrent_days[*]
        content {
          noncurrent_days = noncurrent_version_expiration.value
        }
      }
      # The mark that is left of a deleted object whose versions are gone. It is no object.
      dynamic "expiration" {
        for_each = rule.value.noncurrent_days[*]
        content {
          expired_object_delete_marker = true
        }
      }
    }
  }
}

resource "aws_s3_bucket_policy" "this" {
  bucket     = aws_s3_bucket.this.id
  depends_on = [aws_s3_bucket_public_access_block.this]
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid       = "OnlyEncryptedConnections"
      Effect    = "Deny"
      Principal = "*"
      Action    = "s3:*"
      Resource  = [aws_s3_bucket.this.arn, "${aws_s3_bucket.this.arn}/*"]
      Condition = { Bool = { "aws:SecureTransport" = "false" } }
    }]
  })
}

resource "aws_iam_role" "this" {
  for_each           = var.trust
  name               = "${var.bucket}-${each.key}"
  assume_role_policy = each.value
}

resource "aws_iam_role_policy" "this" {
  for_each = var.trust
  name     = "bucket"
  role     = aws_iam_role.this[each.key].id
  policy   = module.policy.policies[each.key]
}

# For instances of `ray up` (../ray/cluster.yaml).
resource "aws_iam_instance_profile" "worker" {
  for_each = toset([for role in keys(var.trust) : role if role == "worker"])
  name     = "${var.bucket}-worker"
  role     = aws_iam_role.this[each.key].name
}

output "store" {
  description = "COUNTERWEIGHT_STORE."
  value       = "s3://${aws_s3_bucket.this.id}"
}

output "roles" {
  description = "ARNs of the identities."
  value       = { for role, made in aws_iam_role.this : role => made.arn }
}

output "instance_profile" {
  description = "ARN of the profile for instances, where a worker is trusted."
  value       = one([for made in aws_iam_instance_profile.worker : made.arn])
}
