"""The application for a Ray cluster: what its arguments become."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

pytestmark = [pytest.mark.matrix, pytest.mark.ray]

# Ray is not for the process of the tests, and to import it takes seconds.
BUILD = """
import json, sys
from types import SimpleNamespace
from cupaged import ray_app
for line in sys.stdin:
    arguments, nodes = json.loads(line)
    nodes = [{"Alive": each is not None, "Resources": each} for each in nodes]
    ray_app.ray = SimpleNamespace(is_initialized=lambda: True, nodes=lambda: nodes)
    try:
        gateway = ray_app.app(arguments)._bound_deployment
        replicas = gateway.init_args[0]._bound_deployment
        scaling = replicas._deployment_config.autoscaling_config
        made = {
            "arguments": replicas.init_args[0],
            "replicas": replicas.num_replicas,
            "resources": replicas.ray_actor_options,
            "scaling": scaling and scaling.model_dump(mode="json"),
            "keys": gateway.init_args[2].api_keys,
        }
    except ValueError as error:
        made = str(error)
    print(json.dumps(made), flush=True)
"""


@pytest.fixture(scope="module")
def build() -> Iterator[Callable[..., Any]]:
    """Return a function that returns what the builder makes of arguments.

    Its second argument are the resources of the cluster's nodes; None is a node that is gone.
    """
    command = [sys.executable, "-c", BUILD]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:

        def build(arguments: dict[str, Any], nodes: Sequence[dict[str, float] | None] = ({"CPU": 4},)) -> Any:
            process.stdin.write(json.dumps([arguments, nodes]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield build


def test_arguments_are_the_options_of_the_command(build):
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
    first, second, third = map(build, [given, {"replicas": "3"}, {"tensor-parallel-size": 2}])
    expected = {"--model=m", "--served-model-name", "a", "b", "--block-size=8", "--max-model-len=64"}
    assert {*first["arguments"][:-1]} == {*expected, "--no-enable-prefix-caching"}
    assert first["resources"]["num_cpus"] == 0.5
    scaling = [first["scaling"][name] for name in ("min_replicas", "max_replicas", "target_ongoing_requests")]
    assert scaling == [1, 4, 7]
    assert first["keys"] == ["k"]
    assert (second["replicas"], second["scaling"]) == (3, None)
    assert (third["replicas"], third["scaling"]) == (1, None)
    assert "--tensor-parallel-size=2" in third["arguments"]


def test_a_replica_reserves_gpus_or_a_share_of_the_cores(build):
    """Reserve what there is, so that `serve run` needs no resources to be given."""
    scaled = {"autoscaling_config": {"min_replicas": 1, "max_replicas": 4}}
    divided = {"replicas": 2, "tensor_parallel_size": 2}
    arguments = [{}, {"replicas": 3}, scaled, divided, {"device": "cpu"}, {"device": "cuda"}]
    for nodes, expected in [
        ([{"CPU": 2}], [2, 0.5, 0.5, 1, 2, "1"]),
        ([{"CPU": 6}, None, {"CPU": 3, "memory": 9}], [6, 3, 2, 3, 6, "1"]),
        ([{"CPU": 8}, {"CPU": 8, "GPU": 4}], ["1", "1", "1", "2", 8, "1"]),
        ([{"CPU": 0.5}, {"CPU": 1}], [1, 0.3333, 0.25, 0.5, 1, "1"]),
        ([], [1, 1, 1, 1, 1, "1"]),
    ]:
        for given, each in zip(arguments, expected, strict=True):
            found = build(given, nodes)["resources"]
            if isinstance(each, str):
                assert found["num_gpus"] == int(each)
            else:
                assert (found["num_cpus"], found.get("num_gpus", 0)) == (each, 0)


def test_arguments_that_are_wrong(build):
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
        ({"device": "cuda:1"}, "device is 'cuda:1', and Ray gives each replica GPUs: give 'cuda'"),
    ]
    for arguments, expected in wrong:
        assert expected in build(arguments)


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
