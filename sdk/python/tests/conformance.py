"""The Python side of the conformance suite: reads calls as JSON lines, carries each out with the package, answers with JSON lines.

Started by `cargo xtask test --only sdk`. It judges nothing: what is expected is written in `sdk/conformance/suite.json`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from msb import Client, Image, MsbError, Sandbox
from msb.models import SandboxDetail
from msb.session import ExecHandle, ExecOutput, Exited, Stderr, Stdout

Arguments = dict[str, Any]


def detail_value(detail: SandboxDetail) -> Arguments:
    return {
        "name": detail.name,
        "status": detail.status,
        "image": detail.image,
        "labels": detail.labels,
        "cause": detail.last_end.cause if detail.last_end else None,
        "detached": detail.spec.get("detached"),
    }


def output_value(output: ExecOutput) -> Arguments:
    return {
        "exit_code": output.exit_code,
        "signal": output.signal,
        "timed_out": output.timed_out,
        "stdout": output.stdout_text,
        "stderr": output.stderr_text,
    }


class Driver:
    def __init__(self) -> None:
        self._client: Client | None = None
        self._held: list[ExecHandle] = []

    async def client(self) -> Client:
        if self._client is None:
            self._client = await Client.connect()
        return self._client

    async def sandbox(self, name: str) -> Sandbox:
        return await Sandbox.get(name, client=await self.client())

    async def connect(self, _: Arguments) -> Any:
        return {"api_version": (await self.client()).version.api_version}

    async def shutdown(self, _: Arguments) -> Any:
        await (await self.client()).shutdown()

    async def create(self, arguments: Arguments) -> Any:
        options = dict(arguments)
        for key in ("idle_timeout", "max_duration", "stop_grace"):
            if f"{key}_ms" in options:
                options[key] = options.pop(f"{key}_ms") / 1000
        # Without a client, so that a refusal comes before any connection.
        return detail_value((await Sandbox.create(options.pop("name"), **options)).detail)

    async def get(self, arguments: Arguments) -> Any:
        return detail_value((await self.sandbox(arguments["name"])).detail)

    async def list(self, arguments: Arguments) -> Any:
        return [found.name for found in await Sandbox.list(labels=arguments.get("labels", ()), client=await self.client())]

    @staticmethod
    def _exec_options(arguments: Arguments) -> tuple[str, Any, Arguments]:
        options = dict(arguments)
        if "timeout_ms" in options:
            options["timeout"] = options.pop("timeout_ms") / 1000
        return options.pop("name"), options.pop("command", None), options

    async def exec(self, arguments: Arguments) -> Any:
        name, command, options = self._exec_options(arguments)
        return output_value(await (await self.sandbox(name)).exec(command, **options))

    async def exec_check(self, arguments: Arguments) -> Any:
        name, command, options = self._exec_options(arguments)
        (await (await self.sandbox(name)).exec(command, **options)).check()

    async def shell(self, arguments: Arguments) -> Any:
        return output_value(await (await self.sandbox(arguments["name"])).shell(arguments["script"]))

    async def exec_many(self, arguments: Arguments) -> Any:
        sandbox = await self.sandbox(arguments["name"])
        good = 0
        for _ in range(arguments["count"]):
            good += (await sandbox.exec(["true"])).success
        return good

    async def exec_stream(self, arguments: Arguments) -> Any:
        name, command, options = self._exec_options(arguments)
        actions = options.pop("actions", [])
        if options.get("terminal"):
            options["terminal"] = tuple(options["terminal"])
        handle = await (await self.sandbox(name)).exec_stream(command, **options)
        async with handle:
            out, err = bytearray(), bytearray()
            async for event in handle:
                if isinstance(event, Stdout):
                    out += event.data
                elif isinstance(event, Stderr):
                    err += event.data
                elif isinstance(event, Exited):
                    return output_value(ExecOutput(event.end, bytes(out), bytes(err)))
                while actions and actions[0].get("after", "").encode() in out:
                    await self._act(handle, actions.pop(0))
        raise AssertionError("a stream without an end")

    @staticmethod
    async def _act(handle: ExecHandle, action: Arguments) -> None:
        if "write" in action:
            await handle.write(action["write"])
        if "signal" in action:
            await handle.signal(action["signal"])
        if "resize" in action:
            await handle.resize(*action["resize"])
        if action.get("close_stdin"):
            await handle.close_stdin()

    async def exec_hold(self, arguments: Arguments) -> Any:
        handle = await (await self.sandbox(arguments["name"])).exec_stream(arguments["command"])
        self._held.append(handle)
        await anext(aiter(handle))

    async def logs(self, arguments: Arguments) -> Any:
        options = dict(arguments)
        sandbox = await self.sandbox(options.pop("name"))
        return "".join([record.data async for record in sandbox.logs(**options)])

    async def events(self, arguments: Arguments) -> Any:
        return [event.state async for event in (await self.sandbox(arguments["name"])).events() if event.event == "state"]

    async def metrics(self, arguments: Arguments) -> Any:
        sample = await (await self.sandbox(arguments["name"])).metrics()
        return sample and {"name": sample.name, "status": sample.status}

    async def start(self, arguments: Arguments) -> Any:
        return detail_value((await Sandbox.start(arguments["name"], client=await self.client())).detail)

    async def _on(self, name: str, act: Callable[[Sandbox], Awaitable[Any]]) -> Any:
        sandbox = await self.sandbox(name)
        await act(sandbox)
        return detail_value(sandbox.detail)

    async def touch(self, arguments: Arguments) -> Any:
        return await self._on(arguments["name"], lambda sandbox: sandbox.touch())

    async def detach(self, arguments: Arguments) -> Any:
        return await self._on(arguments["name"], lambda sandbox: sandbox.detach())

    async def stop(self, arguments: Arguments) -> Any:
        grace = arguments["grace_ms"] / 1000 if "grace_ms" in arguments else None
        return await self._on(arguments["name"], lambda sandbox: sandbox.stop(grace=grace))

    async def kill(self, arguments: Arguments) -> Any:
        return await self._on(arguments["name"], lambda sandbox: sandbox.kill())

    async def restart(self, arguments: Arguments) -> Any:
        return await self._on(arguments["name"], lambda sandbox: sandbox.restart())

    async def wait(self, arguments: Arguments) -> Any:
        return await self._on(arguments["name"], lambda sandbox: sandbox.wait_until_stopped())

    async def remove(self, arguments: Arguments) -> Any:
        await Sandbox.remove(arguments["name"], force=arguments.get("force", False), client=await self.client())

    async def image_load(self, arguments: Arguments) -> Any:
        loaded = await Image.load(arguments["path"], client=await self.client())
        return [image.references for image in loaded]

    async def image_list(self, _: Arguments) -> Any:
        return [image.reference for image in await Image.list(client=await self.client())]

    async def image_inspect(self, arguments: Arguments) -> Any:
        image = await Image.inspect(arguments["reference"], client=await self.client())
        return {
            "references": image.references,
            "layers": image.layers,
            "layer_details": len(image.layer_details),
            "user": image.config.user,
            "working_dir": image.config.working_dir,
            "used_by": image.used_by,
        }

    async def image_remove(self, arguments: Arguments) -> Any:
        await Image.remove(arguments["reference"], force=arguments.get("force", False), client=await self.client())


async def main() -> None:
    driver = Driver()
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        try:
            answer: Arguments = {"ok": await getattr(driver, request["call"])(request.get("args", {}))}
        except MsbError as error:
            answer = {
                "error": error.code,
                "kind": type(error).__name__,
                "message": error.message,
                "hint": error.hint,
                "details": list(error.details),
            }
        print(json.dumps(answer), flush=True)


asyncio.run(main())
