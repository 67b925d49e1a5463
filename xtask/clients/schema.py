"""`schemathesis` from PyPI, which makes requests of the server's OpenAPI document."""

import os
import pathlib
import subprocess
import sys

from common import server

SECONDS = os.environ.get("DIFFUSE_SCHEMA_SECONDS", "60")


def main():
    with server("--max-steps", "3", "--max-images", "2", "--max-pixels", "16384") as running:
        command = [
            str(pathlib.Path(sys.executable).parent / "schemathesis"), "run",
            running.url + "/openapi.json", "--max-time", SECONDS, "--seed", "1", "--no-color",
            "--continue-on-failure", "--workers", "2", "--request-timeout", "60",
            # A size has to be a multiple of 8, a sampler one of a list: the schema has no such.
            "--exclude-checks", "positive_data_acceptance",
            "--suppress-health-check", "filter_too_much",
        ]
        subprocess.run(command + sys.argv[2:], check=True)
        # The server is still there, and says what it did.
        numbers = running.metrics()
        print({name: numbers[name] for name in numbers if name.startswith("diffuse_jobs_total")})


main()
