"""A training in one of several processes, which may kill itself: a program for a launcher, told what to do in JSON."""

import json
import os
import sys

import killed_runs

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    if job.pop("victim", None) != int(os.environ["RANK"]):
        job.pop("point", None)
    killed_runs.train(**job)
