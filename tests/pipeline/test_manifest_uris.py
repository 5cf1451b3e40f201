"""Where a manifest comes from, and where its URIs lead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterweight.pipeline.manifest import (
    load_manifest,
    resolve_uri,
)
from counterweight.workers.calibration.source import DatasetSource, TextSource, TokensSource
from counterweight.workers.errors import ManifestError, RequestError
from tests.pipeline.manifest_documents import BASE, FULL, MINIMAL, job, refused


class TestUris:
    @pytest.mark.parametrize(
        ("uri", "absolute"),
        [
            ("a.txt", "file:///jobs/a.txt"),
            ("./a/../b.txt", "file:///jobs/b.txt"),
            ("../a.txt", "file:///a.txt"),
            ("../../../a.txt", "file:///a.txt"),
            ("/a/b.txt", "file:///a/b.txt"),
            ("//a/b.txt", "file:///a/b.txt"),
            ("file:a.txt", "file:///jobs/a.txt"),
            ("file:../a.txt", "file:///a.txt"),
            ("file:/a/./b.txt", "file:///a/b.txt"),
            ("file:///a/b.txt", "file:///a/b.txt"),
            ("a b.txt", "file:///jobs/a%20b.txt"),
            ("file:a%20b.txt", "file:///jobs/a%20b.txt"),
            ("a%20b.txt", "file:///jobs/a%2520b.txt"),
            ("./a:b.txt", "file:///jobs/a%3Ab.txt"),
            ("./~/a.txt", "file:///jobs/~/a.txt"),
            ("a/$HOME/b.txt", "file:///jobs/a/%24HOME/b.txt"),
            ("s3://bucket/a", "s3://bucket/a"),
            ("s3://bucket", "s3://bucket"),
        ],
    )
    def test_beside_a_local_manifest(self, uri: str, absolute: str) -> None:
        assert resolve_uri(uri, BASE) == absolute
        assert resolve_uri(absolute, BASE) == absolute
        assert resolve_uri(absolute, None) == absolute

    @pytest.mark.parametrize(
        ("uri", "absolute"),
        [
            ("a.txt", "s3://bucket/jobs/a.txt"),
            ("../a.txt", "s3://bucket/a.txt"),
            ("..", "s3://bucket"),
            ("/a.txt", "file:///a.txt"),
            ("s3://other/a", "s3://other/a"),
        ],
    )
    def test_beside_a_manifest_in_s3(self, uri: str, absolute: str) -> None:
        assert resolve_uri(uri, "s3://bucket/jobs") == absolute

    @pytest.mark.parametrize(
        ("uri", "base"),
        [
            ("", BASE),
            ("a\nb", BASE),
            ("a\0b", BASE),
            ("x" * 2001, BASE),
            ("http://host/a", BASE),
            ("hf:owner/name", BASE),
            ("S3://bucket/a", BASE),
            ("s3:/bucket/a", BASE),
            ("s3://b cket/a", BASE),
            ("s3://bucket/a/../b", BASE),
            ("file://host/a", BASE),
            ("~/a", BASE),
            ("$HOME/a", BASE),
            ("file:~/a", BASE),
            ("C:\\a", BASE),
            ("a.txt", None),
            ("file:a.txt", None),
            ("file:a.txt", "s3://bucket/jobs"),
            ("../../a.txt", "s3://bucket/jobs"),
        ],
    )
    def test_what_leads_nowhere_is_refused(self, uri: str, base: str | None) -> None:
        with pytest.raises(RequestError):
            resolve_uri(uri, base)

    @pytest.mark.parametrize("uri", ["hf:gpt2", "hf:owner/name", "hf://owner/name", "hf:owner/name@v1.0"])
    def test_a_model_may_come_from_the_hub(self, uri: str) -> None:
        assert job(MINIMAL, f"spec.model.uri={uri}").spec.model.uri == uri

    @pytest.mark.parametrize("uri", ["hf:/", "hf:a/b/c", "hf:../a", "hf:/a", "hf:a/b@", "hf:a b"])
    def test_a_wrong_hub_name(self, uri: str) -> None:
        assert refused(MINIMAL, f"spec.model.uri={uri}").startswith(f"spec.model.uri: '{uri}': expected hf:owner/name")

    def test_every_uri_of_a_job_is_resolved(self) -> None:
        spec = job(FULL).spec
        assert spec.model.uri == "file:///jobs/model"
        assert spec.output.uri == "file:///jobs/out"
        assert spec.calibration.source == TextSource(uri="file:///jobs/text.txt")
        assert spec.validation is not None
        assert spec.validation.text == TextSource(uri="file:///jobs/other.txt")
        tokens = job(FULL, "spec.calibration.source.kind=tokens").spec.calibration.source
        assert tokens == TokensSource(uri="file:///jobs/text.txt")

    def test_every_wrong_uri_is_told(self) -> None:
        found = refused(
            FULL,
            "spec.model.uri=http://a",
            "spec.calibration.source.uri=hf:a/b",
            "spec.validation.text.uri=~/a",
            "spec.output.uri=file://host/a",
        )
        assert [line.split(": ")[:2] for line in found.splitlines()] == [
            ["spec.model.uri", "'http://a'"],
            ["spec.calibration.source.uri", "'hf:a/b'"],
            ["spec.validation.text.uri", "'~/a'"],
            ["spec.output.uri", "'file://host/a'"],
        ]

    @pytest.mark.parametrize(
        ("path", "resolved"),
        [
            ("owner/name", "owner/name"),
            ("./data", "/jobs/data"),
            ("file:data", "/jobs/data"),
            ("/data", "/data"),
        ],
    )
    def test_a_data_set_is_a_hub_name_or_a_directory(self, path: str, resolved: str) -> None:
        source = job(MINIMAL, f"spec.calibration.source={{kind: dataset, path: '{path}'}}").spec.calibration.source
        assert source == DatasetSource(path=resolved)


class TestLoading:
    def test_from_a_path_a_uri_and_a_relative_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "with space"
        folder.mkdir()
        path = folder / "job.yaml"
        path.write_text(MINIMAL)
        monkeypatch.chdir(folder)
        for location in (str(path), path.as_uri(), "job.yaml", "./job.yaml", "file:job.yaml"):
            loaded = load_manifest(location)
            assert loaded.base == folder.resolve().as_uri()
            assert loaded.job.spec.output.uri == (folder.resolve() / "out").as_uri()

    def test_overrides_are_applied(self, tmp_path: Path) -> None:
        path = tmp_path / "job.yaml"
        path.write_text(MINIMAL)
        assert load_manifest(str(path), ["spec.recipe.weights.bits=2"]).job.spec.recipe.weights.bits == 2

    def test_links_to_the_directory_are_followed_and_links_to_the_file_are_not(self, tmp_path: Path) -> None:
        (tmp_path / "mount" / "..data").mkdir(parents=True)
        (tmp_path / "mount" / "..data" / "job.yaml").write_text(MINIMAL)
        (tmp_path / "mount" / "job.yaml").symlink_to("..data/job.yaml")
        (tmp_path / "link").symlink_to("mount")
        loaded = load_manifest(str(tmp_path / "link" / "job.yaml"))
        assert loaded.base == (tmp_path / "mount").resolve().as_uri()

    def test_from_s3(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import boto3
        from moto import mock_aws

        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        with mock_aws():
            client = boto3.client("s3")
            client.create_bucket(Bucket="bucket")
            client.put_object(Bucket="bucket", Key="jobs/job.yaml", Body=MINIMAL.encode())
            client.put_object(Bucket="bucket", Key="jobs/large.yaml", Body=bytes(1 << 18))
            loaded = load_manifest("s3://bucket/jobs/job.yaml", ["spec.model.uri=hf:owner/name"])
            assert loaded.base == "s3://bucket/jobs"
            assert loaded.job.spec.output.uri == "s3://bucket/jobs/out"
            with pytest.raises(ManifestError, match=r"^s3://bucket/jobs/none.yaml: no such object"):
                load_manifest("s3://bucket/jobs/none.yaml")
            with pytest.raises(ManifestError, match=r"^s3://bucket/jobs/large.yaml: larger than 128 KiB"):
                load_manifest("s3://bucket/jobs/large.yaml")
        with pytest.raises(ManifestError, match="names a bucket or a prefix"):
            load_manifest("s3://bucket/jobs/")

    def test_the_environment_changes_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "job.yaml"
        path.write_text(MINIMAL.replace("uri: out", "uri: './${HOME}/out'"))
        assert load_manifest(str(path)).job.spec.output.uri.endswith("/%24%7BHOME%7D/out")

    def test_importing_it_imports_neither_ray_nor_transformers_nor_boto3(self) -> None:
        heavy = "{'ray', 'transformers', 'boto3'}"
        code = f"import sys, counterweight.pipeline.manifest; print(sorted({heavy} & sys.modules.keys()))"
        root = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        found = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == "[]"


@settings(max_examples=50, deadline=None)
@given(uri=st.text(max_size=40), base=st.sampled_from([BASE, "s3://bucket/jobs", None]))
def test_any_uri_is_resolved_for_good_or_refused(uri: str, base: str | None) -> None:
    try:
        absolute = resolve_uri(uri, base)
    except RequestError:
        return
    assert absolute.startswith(("file:///", "s3://"))
    assert resolve_uri(absolute, None) == absolute
