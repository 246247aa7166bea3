"""The other side of the interop tests: oslo.messaging as OpenStack's services use it.

Reads one JSON command a line from stdin and answers each with one JSON line on stdout. The test
decides what happens; this file only lends it Python's client, server, notifier and listener.
"""

import json
import logging
import os
import sys
import time
import warnings

# The library's own deprecations are not what is tested here.
warnings.simplefilter("ignore")

import oslo_messaging
from oslo_config import cfg

EXCHANGE = "interop"


class VolumeNotFound(Exception):
    """An exception of a module that no caller allows to be rebuilt."""


class Endpoint:
    target = oslo_messaging.Target(version="1.3")

    def __init__(self):
        self.notes = []

    def echo(self, context, **args):
        return args

    def context(self, context):
        return context

    def note(self, context, **args):
        self.notes.append(args)

    def noted(self, context):
        return self.notes

    def raise_own(self, context):
        raise VolumeNotFound("Volume v1 could not be found")

    def raise_builtin(self, context):
        raise ValueError("not like this", 7)

    def sleep(self, context, seconds):
        time.sleep(seconds)
        return "woke"


class NamespacedEndpoint:
    target = oslo_messaging.Target(namespace="special", version="2.0")

    def where(self, context):
        return "special"


class Heard:
    """Takes notifications of every priority."""

    def __init__(self):
        self.events = []

    def _take(self, priority):
        def take(context, publisher_id, event_type, payload, metadata):
            self.events.append({
                "context": context,
                "publisher_id": publisher_id,
                "event_type": event_type,
                "payload": payload,
                "priority": priority,
            })
        return take

    def __getattr__(self, name):
        if name in ("info", "error"):
            return self._take(name)
        raise AttributeError(name)


class Peer:
    def __init__(self):
        # The library registers its metrics options on the global object alone.
        self.conf = cfg.CONF
        self.conf([], default_config_files=[])
        oslo_messaging.set_transport_defaults(EXCHANGE)
        self.transports = {}
        self.heard = Heard()

    def connect(self, name, url):
        """Makes a transport under a name. The URL's query carries the queue options."""
        transport = oslo_messaging.get_rpc_transport(
            self.conf, url=url, allowed_remote_exmods=[])
        self.transports[name] = (url, transport)

    def serve(self, name, topic, server):
        transport = self.transports[name][1]
        target = oslo_messaging.Target(exchange=EXCHANGE, topic=topic, server=server)
        rpc = oslo_messaging.get_rpc_server(
            transport, target, [Endpoint(), NamespacedEndpoint()], executor="threading")
        rpc.start()

    def call(self, name, topic, method, args, server=None, version=None, namespace=None,
             timeout=20, monitor=None, context=None):
        client = self._client(name, topic, server, False, version, namespace)
        client = client.prepare(timeout=timeout, call_monitor_timeout=monitor)
        return client.call(context or {}, method, **args)

    def cast(self, name, topic, method, args, server=None, fanout=False):
        self._client(name, topic, server, fanout, None, None).cast({}, method, **args)

    def _client(self, name, topic, server, fanout, version, namespace):
        transport = self.transports[name][1]
        target = oslo_messaging.Target(
            exchange=EXCHANGE, topic=topic, server=server, fanout=fanout or None,
            version=version, namespace=namespace)
        return oslo_messaging.get_rpc_client(transport, target)

    def notify(self, name, topic, event_type, payload):
        url = self.transports[name][0]
        transport = oslo_messaging.get_notification_transport(self.conf, url=url)
        notifier = oslo_messaging.Notifier(
            transport, "python.h1", driver="messagingv2", topics=[topic])
        notifier.info({"request_id": "req-1"}, event_type, payload)

    def listen(self, name, topic):
        url = self.transports[name][0]
        transport = oslo_messaging.get_notification_transport(self.conf, url=url)
        targets = [oslo_messaging.Target(exchange=EXCHANGE, topic=topic)]
        listener = oslo_messaging.get_notification_listener(
            transport, targets, [self.heard], executor="threading")
        listener.start()

    def events(self):
        return self.heard.events


def main():
    logging.basicConfig(stream=sys.stderr, level=logging.CRITICAL)
    out = sys.stdout
    # The library prints here and there; the protocol's line must stay ours.
    sys.stdout = sys.stderr
    peer = Peer()
    for line in sys.stdin:
        command = json.loads(line)
        operation = getattr(peer, command.pop("op"))
        try:
            answer = {"ok": operation(**command)}
        except Exception as error:  # every failure is an answer
            bases = [base.__name__ for base in type(error).__mro__]
            answer = {
                "error": type(error).__name__,
                "bases": bases,
                "message": str(error),
                "exc_type": getattr(error, "exc_type", None),
            }
        out.write(json.dumps(answer) + "\n")
        out.flush()
    # The library's threads would keep the process for seconds.
    out.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
