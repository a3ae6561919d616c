"""The Python side of the conformance suite: reads calls as JSON lines, carries each out with the package, answers with JSON lines.

Started by `cargo xtask test --only sdk`. It judges nothing: what is expected is written in `sdk/conformance/suite.json`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

from msb import Client, Fs, Image, Mount, MsbError, Network, Sandbox, Volume
from msb.models import SandboxDetail, VolumeDetail
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
        "security": detail.spec["security"],
        "network": detail.spec["network"]["profile"],
        "rules": len(detail.spec["network"]["rules"]),
        "ports": len(detail.ports),
        "mounts": [mount["target"] for mount in detail.spec.get("mounts", [])],
    }


def output_value(output: ExecOutput) -> Arguments:
    return {
        "exit_code": output.exit_code,
        "signal": output.signal,
        "timed_out": output.timed_out,
        "stdout": output.stdout_text,
        "stderr": output.stderr_text,
    }


def mount(value: Arguments) -> Mount:
    options = dict(value)
    kind, target = options.pop("kind"), options.pop("target")
    if kind == "bind":
        return Volume.bind(options.pop("path"), target, **options)
    return Volume.named(options.pop("name"), target, **options) if kind == "named" else Volume.tmpfs(target, **options)


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
        if "root_directory" in options:
            options["image"] = Image.bind(options.pop("root_directory"))
        options["mounts"] = [mount(value) for value in options.get("mounts", ())]
        if isinstance(options.get("network"), dict):
            options["network"] = Network(**options["network"])
        # Without a client, so that a refusal comes before any connection.
        return detail_value((await Sandbox.create(options.pop("name"), **options)).detail)

    async def get(self, arguments: Arguments) -> Any:
        return detail_value((await self.sandbox(arguments["name"])).detail)

    async def list(self, arguments: Arguments) -> Any:
        labels, selector = arguments.get("labels", ()), arguments.get("selector")
        return [found.name for found in await Sandbox.list(labels=labels, selector=selector, client=await self.client())]

    async def pages(self, arguments: Arguments) -> Any:
        labels, limit, pages, after = arguments.get("labels", ()), arguments["limit"], [], None
        while True:
            page = await Sandbox.list_page(labels=labels, limit=limit, after=after, client=await self.client())
            pages.append([found.name for found in page.sandboxes])
            if page.next is None:
                return pages
            after = page.next

    async def ping(self, arguments: Arguments) -> Any:
        return (await (await self.sandbox(arguments["name"])).ping()).round_trip_us > 0

    async def ssh_config(self, arguments: Arguments) -> Any:
        found = await (await self.sandbox(arguments["name"])).ssh_config(alias=arguments.get("alias"))
        return {"alias": found.alias, "config": found.config}

    async def metrics_stream(self, arguments: Arguments) -> Any:
        names: list[str] = []
        async for sample in (await self.sandbox(arguments["name"])).metrics_stream(interval=arguments["interval_ms"] / 1000):
            names.append(sample.name)
            if len(names) == arguments["count"]:
                break
        return names

    async def metrics_history(self, arguments: Arguments) -> Any:
        history = await (await self.sandbox(arguments["name"])).metrics_history()
        return {"name": history.name, "has_points": len(history.points) > 0}

    async def copy_into(self, arguments: Arguments) -> Any:
        sandbox = await self.sandbox(arguments["name"])
        return (await sandbox.copy_into(arguments["path"], arguments["target"])).warnings

    async def copy_out(self, arguments: Arguments) -> Any:
        sandbox = await self.sandbox(arguments["name"])
        return (await sandbox.copy_out(arguments["path"], arguments["target"])).warnings

    async def _fs(self, arguments: Arguments) -> tuple[Fs, str]:
        return (await self.sandbox(arguments["name"])).fs, arguments["path"]

    async def fs_mkdir(self, arguments: Arguments) -> Any:
        fs, path = await self._fs(arguments)
        await fs.mkdir(path, parents=arguments.get("parents", False))

    async def fs_write(self, arguments: Arguments) -> Any:
        fs, path = await self._fs(arguments)
        return {"size": (await fs.write(path, arguments["content"], mode=arguments.get("mode"))).size}

    async def fs_append(self, arguments: Arguments) -> Any:
        fs, path = await self._fs(arguments)
        return {"size": (await fs.append(path, arguments["content"])).size}

    async def fs_read(self, arguments: Arguments) -> Any:
        fs, path = await self._fs(arguments)
        if "offset" not in arguments:
            return await fs.read_text(path)
        part = fs.read_stream(path, offset=arguments["offset"], length=arguments["length"])
        return b"".join([piece async for piece in part]).decode()

    async def fs_stat(self, arguments: Arguments) -> Any:
        fs, path = await self._fs(arguments)
        found = await fs.stat(path, follow=arguments.get("follow", True))
        kind = "symlink" if found.is_symlink else "file" if found.is_file else "directory" if found.is_directory else "other"
        return {"kind": kind, "size": found.size, "mode": found.mode & 0o7777}

    async def fs_chmod(self, arguments: Arguments) -> Any:
        fs, path = await self._fs(arguments)
        await fs.chmod(path, arguments["mode"])

    async def fs_symlink(self, arguments: Arguments) -> Any:
        fs, path = await self._fs(arguments)
        await fs.symlink(arguments["target"], path)

    async def fs_read_link(self, arguments: Arguments) -> Any:
        fs, path = await self._fs(arguments)
        return await fs.read_link(path)

    async def fs_real_path(self, arguments: Arguments) -> Any:
        fs, path = await self._fs(arguments)
        return await fs.real_path(path)

    async def fs_list(self, arguments: Arguments) -> Any:
        fs, path = await self._fs(arguments)
        return [entry.name for entry in await fs.list(path)]

    async def fs_rename(self, arguments: Arguments) -> Any:
        fs, path = await self._fs(arguments)
        await fs.rename(path, arguments["target"])

    async def fs_exists(self, arguments: Arguments) -> Any:
        fs, path = await self._fs(arguments)
        return await fs.exists(path)

    async def fs_watch(self, arguments: Arguments) -> Any:
        fs, path = await self._fs(arguments)
        async for change in fs.watch(path):
            if change.kind == "watching":
                await fs.append(arguments["touch"], "seen")
            elif change.kind == "created":
                return change.path
        raise AssertionError("a watch without an end")

    async def fs_remove(self, arguments: Arguments) -> Any:
        fs, path = await self._fs(arguments)
        await fs.remove(path, recursive=arguments.get("recursive", False))

    async def volume_create(self, arguments: Arguments) -> Any:
        options = dict(arguments)
        return self._volume(await Volume.create(options.pop("name"), **options, client=await self.client()))

    @staticmethod
    def _volume(found: VolumeDetail) -> Arguments:
        users = [user.sandbox for user in found.users]
        return {"name": found.name, "kind": found.kind, "size_bytes": found.size_bytes, "users": users}

    async def volume_get(self, arguments: Arguments) -> Any:
        return self._volume(await Volume.get(arguments["name"], client=await self.client()))

    async def volume_list(self, _: Arguments) -> Any:
        return [found.name for found in await Volume.list(client=await self.client())]

    async def volume_remove(self, arguments: Arguments) -> Any:
        await Volume.remove(arguments["name"], client=await self.client())

    async def image_tag(self, arguments: Arguments) -> Any:
        return (await Image.tag(arguments["reference"], arguments["tag"], client=await self.client())).references

    async def image_save(self, arguments: Arguments) -> Any:
        await Image.save(arguments["reference"], arguments["path"], client=await self.client())

    async def image_prune(self, arguments: Arguments) -> Any:
        client = await self.client()
        if arguments.get("dry_run"):
            report = await Image.prune(dry_run=True, client=client)
        else:
            # The old name does the same, and says that it is old.
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                report = await Image.gc(client=client)
            assert [warning.category for warning in told] == [DeprecationWarning], told
        return {key: getattr(report, key) for key in ("dry_run", "manifests_removed", "image_refs_removed", "layers_removed")}

    async def image_pull(self, arguments: Arguments) -> Any:
        steps: list[str] = []
        client, heard = await self.client(), lambda step: steps.append(step.type)
        image = await Image.pull(arguments["reference"], insecure=True, progress=heard, client=client)
        return {"references": image.references, "steps": steps}

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

    async def settle(self, _: Arguments) -> Any:
        gc.collect()

    async def first_byte(self, arguments: Arguments) -> Any:
        client, began = await self.client(), time.monotonic()
        sandbox = await Sandbox.create(image=arguments["image"], ephemeral=True, client=client)
        async with await sandbox.exec_stream(["echo", "x"]) as handle:
            async for event in handle:
                if isinstance(event, Stdout):
                    break
            took = time.monotonic() - began
        await sandbox.delete(force=True)
        return took * 1000

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
        if "resize" in action:
            await handle.resize(*action["resize"])
        if "write" in action:
            await handle.write(action["write"])
        if "signal" in action:
            await handle.signal(action["signal"])
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
                "errno": error.errno,
            }
        print(json.dumps(answer), flush=True)


asyncio.run(main())
