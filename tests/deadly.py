"""A program of test_pairs: pairs of CTs by a thread and by a process, one of which kills the process that reads it; and
work that is still under way at the end."""
import json, multiprocessing, os, time

import numpy as np

from radrotator.core import RadRotatorError
from radrotator.ct.volume import CT
from radrotator.pairs.live import OnTheFlyPairs
from radrotator.pairs.plan import Job, SetPlan


class DeadlyPlan(SetPlan):
    "A plan whose CTs end their process, or take their time"
    def load_ct(self, job):
        if job.name == "deadly":
            if multiprocessing.parent_process(): os._exit(9)
            raise RadRotatorError("cannot read it in a thread", "OF_A_THREAD")
        if job.name == "slow": time.sleep(600)
        hu = np.random.default_rng(len(job.name)).normal(0, 300, (10, 10, 30)).astype(np.float32)
        return CT(hu, np.diag([20.0, 20, 12, 1]))


if __name__ == "__main__":
    plan = DeadlyPlan(drrs=9, size=16, fov=(150, 150))
    jobs = [Job(name, name, 1) for name in ("one", "three", "deadly")]
    thread, one = (OnTheFlyPairs(jobs, plan, held=1, refresh=1, workers=workers) for workers in (0, 1))
    for step in range(4): assert (thread.batch(0, step, 4).target == one.batch(0, step, 4).target).all()
    print(json.dumps([dict(thread.refused), dict(one.refused)]), flush=True)
    for feed in (one, thread): feed.prefetcher.submit(Job("slow", "slow", 1))
    time.sleep(1)
