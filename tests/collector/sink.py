"""Receives OTLP/HTTP metrics and prints each data point as a line of JSON, decoded with the official protobuf definitions.

Used by the whole-system test of metrics, behind a real collector. The first line is the port. It stores nothing.
"""

import gzip
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

OUT = Lock()


def attributes(pairs):
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def points(request):
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                kind = metric.WhichOneof("data")
                data = getattr(metric, kind)
                for point in data.data_points:
                    value = point.WhichOneof("value")
                    yield {
                        "resource": attributes(resource.resource.attributes),
                        "scope": scope.scope.name,
                        "name": metric.name,
                        "unit": metric.unit,
                        "kind": kind,
                        "monotonic": kind == "sum" and data.is_monotonic,
                        "cumulative": kind == "sum" and data.aggregation_temporality == 2,
                        "value": getattr(point, value) if value else None,
                        "flags": point.flags,
                        "start": point.start_time_unix_nano,
                        "time": point.time_unix_nano,
                        "attributes": attributes(point.attributes),
                    }


class Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        lines = "".join(json.dumps(point) + "\n" for point in points(ExportMetricsServiceRequest.FromString(body)))
        with OUT:
            sys.stdout.write(lines)
            sys.stdout.flush()
        answer = ExportMetricsServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
print(json.dumps({"port": server.server_address[1]}), flush=True)
server.serve_forever()
