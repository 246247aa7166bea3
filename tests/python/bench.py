"""Speed of Python's oslo.messaging, as OpenStack's services use it: the floor of the bus benchmark.

    bench.py serve URL SERVER                 a server with one method; prints "ready"
    bench.py call URL SERVER                  for each line "CALLS CALLERS": that many calls by that many callers; prints JSON
"""

import json
import os
import sys
import threading
import time

import oslo_messaging
from oslo_config import cfg

TARGET = {"exchange": "bench", "topic": "python", "version": "1.0"}


class Endpoint:
    target = oslo_messaging.Target(version="1.0")

    def echo(self, context, **args):
        return args


def transport(url):
    cfg.CONF([], default_config_files=[])
    return oslo_messaging.get_rpc_transport(cfg.CONF, url=url)


def serve(url, name):
    target = oslo_messaging.Target(server=name, **{k: TARGET[k] for k in ("exchange", "topic")})
    server = oslo_messaging.get_rpc_server(
        transport(url), target, [Endpoint()], executor="threading")
    server.start()
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)


def call(url, name):
    # Release 14 has no function for it yet.
    get_rpc_client = getattr(oslo_messaging, "get_rpc_client", oslo_messaging.RPCClient)
    client = get_rpc_client(transport(url), oslo_messaging.Target(server=name, **TARGET))
    client.call({}, "echo", warm="up")
    for line in sys.stdin:
        measure(client, *map(int, line.split()))
    os._exit(0)


def measure(client, calls, callers):
    latencies = []

    def work(share):
        mine = []
        for number in range(share):
            begun = time.perf_counter()
            client.call({}, "echo", number=number, text="x" * 100)
            mine.append(time.perf_counter() - begun)
        latencies.extend(mine)

    threads = [threading.Thread(target=work, args=(calls // callers,)) for _ in range(callers)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    latencies.sort()
    print(json.dumps({
        "calls_per_second": len(latencies) / seconds,
        "p50_ms": latencies[len(latencies) // 2] * 1000,
        "p99_ms": latencies[len(latencies) * 99 // 100] * 1000,
    }), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:4])
    else:
        call(*sys.argv[2:4])
