"""The application for a Ray cluster: what its arguments become."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = [pytest.mark.matrix, pytest.mark.ray]

# Ray is not for the process of the tests.
BUILD = """
import json, sys
from cupaged import ray_app
for arguments in json.loads(sys.argv[1]):
    try:
        gateway = ray_app.app(arguments)._bound_deployment
        replicas = gateway.init_args[0]._bound_deployment
        scaling = replicas._deployment_config.autoscaling_config
        print(json.dumps({
            "arguments": replicas.init_args[0],
            "replicas": replicas.num_replicas,
            "resources": replicas.ray_actor_options,
            "scaling": scaling and scaling.model_dump(mode="json"),
            "keys": gateway.init_args[2].api_keys,
        }))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def built(*arguments: dict[str, Any]) -> list[Any]:
    """Return what the builder makes of each of the arguments."""
    command = [sys.executable, "-c", BUILD, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_arguments_are_the_options_of_the_command():
    given = {
        "model": "m",
        "max-model-len": "64",
        "block_size": 8,
        "enable_prefix_caching": "false",
        "log_stats": True,
        "served_model_name": ["a", "b"],
        "api_key": "k",
        "ray_actor_options": '{"num_cpus": 0.5}',
        "autoscaling_config": {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 7},
    }
    divided = {"tensor_parallel_size": 2}
    first, second, third, fourth = built(given, {"replicas": "3"}, {"device": "cpu"}, divided)
    expected = {"--model=m", "--served-model-name", "a", "b", "--block-size=8", "--max-model-len=64"}
    assert {*first["arguments"][:-1]} == {*expected, "--no-enable-prefix-caching"}
    assert first["resources"]["num_cpus"] == 0.5
    scaling = [first["scaling"][name] for name in ("min_replicas", "max_replicas", "target_ongoing_requests")]
    assert scaling == [1, 4, 7]
    assert first["keys"] == ["k"]
    assert (second["replicas"], second["resources"]["num_gpus"], second["scaling"]) == (3, 1, None)
    assert (third["replicas"], third["resources"].get("num_gpus", 0)) == (1, 0)
    assert third["resources"]["num_cpus"] == 1
    assert fourth["resources"]["num_gpus"] == 2  # one for each rank
    assert "--tensor-parallel-size=2" in fourth["arguments"]


def test_arguments_that_are_wrong():
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"modle": "m"}, "the argument modle is no option"),
        ({"port": 80}, "the argument port is a matter of Ray Serve's proxies"),
        ({"block_size": "many"}, "argument --block-size: invalid int value"),
        ({"block_size": 12}, "block_size must be"),
        ({"log_stats": "maybe"}, "log_stats must be true or false"),
        ({"ray_actor_options": "{"}, "ray_actor_options must be a mapping, or one in JSON"),
        ({"autoscaling_config": [1]}, "autoscaling_config must be a mapping"),
        ({"autoscaling_config": {}, "replicas": 2}, "replicas and autoscaling_config are given"),
        ({"replicas": 0}, "replicas must be at least 1"),
    ]
    for (_, expected), error in zip(wrong, built(*(arguments for arguments, _ in wrong))):
        assert expected in error


ROUTE = """
import asyncio
from types import SimpleNamespace as N
from ray.serve._private.common import DeploymentID
from ray.serve.request_router import PendingRequest, ReplicaID
from cupaged.engine.replicas.ray_router import PrefixRouter, Route

async def main():
    router = object.__new__(PrefixRouter)
    router.initialize_state(max_imbalance=1)
    ids = [ReplicaID(unique_id=name, deployment_id=DeploymentID(name="d")) for name in "ab"]
    replicas = [N(replica_id=each) for each in ids]
    router._choice.update(set(ids))

    def request(n, hashes=(), avoid=None):
        route = Route(list(hashes), avoid)
        return PendingRequest(args=[route], kwargs={}, metadata=N(internal_request_id=str(n)))

    def loads():
        return sorted(router._choice.loads.values())

    one, two = request(1), request(2)
    (f1,), (o1,) = await router.choose_replicas(replicas, one)
    (f2,), _ = await router.choose_replicas(replicas, two)
    assert f1 is not f2 and o1 is f2, "those chosen at once are balanced"
    assert loads() == [1, 1]
    router.on_request_routed(one, f1.replica_id, None)
    router.on_request_completed(f2.replica_id, "2")      # before it was accepted
    router.on_request_routed(two, f2.replica_id, None)
    assert loads() == [0, 1]
    three = request(3)
    await router.choose_replicas(replicas, three)
    await router.choose_replicas(replicas, three)        # tried again
    assert sum(loads()) == 2
    three.future.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert loads() == [0, 1]
    (f,), _ = await router.choose_replicas(replicas, request(4, avoid=f1.replica_id.unique_id))
    assert f is f2
    router.on_request_routed(request(4), f1.replica_id, None)   # the second rank took it
    assert router._choice.loads[f1.replica_id] == 2
    router.on_request_completed(f1.replica_id, "4")
    router.on_request_completed(f1.replica_id, "1")
    router.on_request_completed(f1.replica_id, "unknown")
    assert loads() == [0, 0] and not router._running
    for n in range(3000):
        router.on_request_completed(ids[0], f"b{n}")
    assert len(router._ended) == 1000
asyncio.run(main())
"""


def test_a_request_counts_at_one_replica_until_it_ends():
    """Whichever it was chosen for before, and in whatever order Ray Serve reports."""
    done = subprocess.run([sys.executable, "-c", ROUTE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
