variables {
  bucket = "models"
}

run "worker" {
  command = plan
  assert {
    condition = alltrue([
      for one in jsondecode(output.policies["worker"]).Statement :
      one.Effect == "Allow" && startswith(one.Resource, "arn:aws:s3:::models") && !contains(one.Action, "s3:*")
    ])
    error_message = "A worker's statements are about the bucket, and name actions."
  }
}

run "reader_changes_nothing" {
  command = plan
  assert {
    condition = alltrue(flatten([
      for one in jsondecode(output.policies["reader"]).Statement :
      [for action in one.Action : can(regex("^s3:(Get|List)", action))]
    ]))
    error_message = "A reader gets and lists."
  }
}

run "outputs" {
  command = plan
  variables {
    outputs = ["team-a/", "team-b/"]
  }
  assert {
    condition = [for rule in output.lifecycle : rule.prefix if startswith(rule.id, "old-versions-of-work")] == [
      "team-a/_work/", "team-b/_work/",
    ]
    error_message = "Each output's work has a rule."
  }
}

run "an_output_is_a_folder" {
  command = plan
  variables {
    outputs = ["team-a"]
  }
  expect_failures = [var.outputs]
}

run "a_bucket_has_a_name" {
  command = plan
  variables {
    bucket = "Models_"
  }
  expect_failures = [var.bucket]
}
