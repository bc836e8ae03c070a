from tests.nemo import faults, jobs
from tests.nemo.faults import Fault
from tests.nemo.ranks import run_ranks
import time, os


def test_probe(workshop):
    for name, fault in {
        "overflow": Fault(overflow=(2, 1)),
    }.items():
        settings = workshop.settings(f"probe-{name}", "llama", trainer={"max_steps": 3, "gpus_per_node": 2})
        plan = jobs.Plan(settings, workshop.nemo("llama"), callback=False)
        t = time.time()
        try:
            out = run_ranks(faults.train, 2, plan, fault)
            for o in out:
                print("OUT", o.error, o.losses)
        except Exception as e:
            print("EXC", str(e)[:3000])
        print("SECONDS", time.time() - t)
