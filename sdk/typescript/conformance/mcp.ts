/**
 * `msb mcp` asked by the MCP client of the npm registry: lists its tools and uses each of them on real sandboxes.
 *
 * Started by `cargo xtask test --only sdk` as `mcp.js PATH-OF-MSB check`, which ends by itself, and as `mcp.js PATH-OF-MSB hold NAME`,
 * which makes a sandbox, runs a command in it, prints `ready` and waits to be killed.
 */

import assert from "node:assert/strict";

import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StdioClientTransport } from "@modelcontextprotocol/sdk/client/stdio.js";

const [msb, what, name] = process.argv.slice(2) as [string, string, string | undefined];
const transport = new StdioClientTransport({ command: msb, args: ["mcp"], env: process.env as Record<string, string>, stderr: "inherit" });
const client = new Client({ name: "msb-conformance", version: "1.0.0" });
await client.connect(transport);

// eslint-disable-next-line @typescript-eslint/no-explicit-any
type Answer = any;
/** Longer than the slowest guest. */
const PATIENCE = { timeout: 300_000 };

async function call(tool: string, args: Record<string, unknown> = {}): Promise<{ failed: boolean; answer: Answer }> {
  const result = await client.callTool({ name: tool, arguments: args }, undefined, PATIENCE);
  const [content] = result.content as { type: string; text: string }[];
  assert.equal(content?.type, "text");
  if (result.structuredContent === undefined) return { failed: result.isError === true, answer: content.text };
  // Clients without structured content read the same from the text.
  assert.deepEqual(JSON.parse(content.text), result.structuredContent);
  return { failed: result.isError === true, answer: result.structuredContent };
}

async function good(tool: string, args: Record<string, unknown> = {}): Promise<Answer> {
  const { failed, answer } = await call(tool, args);
  assert.equal(failed, false, `${tool}: ${JSON.stringify(answer)}`);
  return answer;
}

async function bad(code: string, tool: string, args: Record<string, unknown>): Promise<Answer> {
  const { failed, answer } = await call(tool, args);
  assert.equal(failed, true, `${tool}: ${JSON.stringify(answer)}`);
  assert.equal(answer.error?.code, code, JSON.stringify(answer));
  assert.ok(answer.error.hint.length > 0, "an error says what to do");
  return answer.error;
}

async function until(what: string, holds: () => Promise<boolean>): Promise<void> {
  for (const end = Date.now() + 60_000; !(await holds()); ) {
    assert.ok(Date.now() < end, `a minute later: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

async function check(): Promise<void> {
  const { tools } = await client.listTools();
  const names = ["create", "exec", "inspect", "list", "metrics", "remove", "run", "shell", "stop"].map((tool) => `sandbox_${tool}`);
  names.push(...["list", "mkdir", "read", "remove", "stat", "write"].map((tool) => `sandbox_fs_${tool}`));
  names.push("volume_create", "volume_list", "volume_remove", "check_installed");
  assert.deepEqual(tools.map((tool) => tool.name).sort(), names.sort());
  for (const tool of tools) assert.ok(tool.description && tool.inputSchema.type === "object", tool.name);

  assert.equal((await good("check_installed")).installed, true);

  // A command in a sandbox of its own, and nothing of it afterwards.
  const ran = await good("sandbox_run", { image: "busybox", memory_mib: 256, command: ["cat"], stdin: "in and out", internet: false });
  assert.deepEqual([ran.exit_code, ran.stdout, ran.timed_out], [0, "in and out", false]);
  assert.deepEqual((await good("sandbox_list")).sandboxes, []);

  const volume = await good("volume_create", { name: "mcp-data" });
  assert.equal(volume.kind, "dir");
  const box = await good("sandbox_create", {
    name: "mcp-box", image: "busybox", memory_mib: 256, env: { A: "1" }, labels: { by: "mcp" }, volumes: ["mcp-data:/data"],
  });
  assert.deepEqual([box.name, box.status], ["mcp-box", "running"]);
  assert.deepEqual((await good("sandbox_list", { labels: ["by=mcp"] })).sandboxes.map((found: Answer) => found.name), ["mcp-box"]);
  assert.equal((await good("sandbox_inspect", { name: "mcp-box" })).spec.ephemeral, true);
  await bad("sandbox_already_exists", "sandbox_create", { name: "mcp-box", image: "busybox" });

  // Commands: ends told truly, output bounded, a time limit, a call that is cancelled ends its command.
  const output = await good("sandbox_exec", { name: "mcp-box", command: ["sh", "-c", "echo $A; echo err >&2; exit 7"] });
  assert.deepEqual([output.exit_code, output.stdout, output.stderr], [7, "1\n", "err\n"]);
  assert.equal((await good("sandbox_shell", { name: "mcp-box", script: "kill -9 $$" })).signal, 9);
  assert.equal((await good("sandbox_exec", { name: "mcp-box", command: ["sleep", "600"], timeout_seconds: 1 })).timed_out, true);
  const long = await good("sandbox_shell", { name: "mcp-box", script: "head -c 300000 /dev/zero | tr '\\0' x; echo end" });
  assert.equal(long.stdout_bytes, 300004);
  assert.ok(long.stdout.length < 70_000 && long.stdout.endsWith("xend\n") && long.stdout.includes("bytes left out"));
  const cancelled = new AbortController();
  const sleeping = client.callTool({ name: "sandbox_exec", arguments: { name: "mcp-box", command: ["sleep", "4321"] } }, undefined, {
    ...PATIENCE,
    signal: cancelled.signal,
  });
  const asleep = async () => (await good("sandbox_shell", { name: "mcp-box", script: "ps | grep -c '[s]leep 4321'" })).stdout.trim() !== "0";
  await until("the command does not run", asleep);
  cancelled.abort();
  await assert.rejects(sleeping);
  await until("a cancelled call's command still runs", async () => !(await asleep()));
  await bad("exec_not_found", "sandbox_exec", { name: "mcp-box", command: ["no-such-program"] });
  await bad("sandbox_not_found", "sandbox_exec", { name: "nobody", command: ["true"] });
  await bad("invalid_name", "sandbox_exec", { name: "../x", command: ["true"] });
  await bad("invalid_config", "sandbox_exec", { name: "mcp-box", command: ["true"], timeout_seconds: 0 });
  const unknown = await call("sandbox_exec", { name: "mcp-box", command: ["true"], comand: [] }).catch((error: unknown) => ({ failed: true, answer: String(error) }));
  assert.ok(unknown.failed && String(unknown.answer).includes("comand"), "an argument that does not exist is named");

  // What a model may not have.
  await bad("permission_denied", "sandbox_create", { image: "busybox", volumes: ["/etc:/host"] });
  await bad("permission_denied", "sandbox_create", { image: "busybox", ports: ["0.0.0.0:8080:80"] });

  // Files: whole, in pieces, as bytes.
  await good("sandbox_fs_mkdir", { name: "mcp-box", path: "/data/deep/er" });
  await good("sandbox_fs_write", { name: "mcp-box", path: "/data/deep/note", content: "grün\n", mode: "600" });
  await good("sandbox_fs_write", { name: "mcp-box", path: "/data/deep/note", content: "more\n", append: true });
  const note = await good("sandbox_fs_read", { name: "mcp-box", path: "/data/deep/note" });
  assert.deepEqual([note.content, note.encoding, note.next_offset], ["grün\nmore\n", "text", null]);
  const piece = await good("sandbox_fs_read", { name: "mcp-box", path: "/data/deep/note", length: 3 });
  assert.deepEqual([piece.content, piece.next_offset], ["gr", 2]);
  await good("sandbox_fs_write", { name: "mcp-box", path: "/data/bytes", content: "/wA=", encoding: "base64" });
  assert.deepEqual((await good("sandbox_fs_read", { name: "mcp-box", path: "/data/bytes" })).content, "/wA=");
  const stat = await good("sandbox_fs_stat", { name: "mcp-box", path: "/data/deep/note" });
  assert.deepEqual([stat.kind, stat.size, stat.mode], ["file", 11, "600"]);
  const listed = (await good("sandbox_fs_list", { name: "mcp-box", path: "/data" })).entries;
  assert.deepEqual(listed.map((entry: Answer) => [entry.name, entry.kind]), [["bytes", "file"], ["deep", "directory"]]);
  await bad("path_exists", "sandbox_fs_remove", { name: "mcp-box", path: "/data/deep" });
  await good("sandbox_fs_remove", { name: "mcp-box", path: "/data/deep", recursive: true });
  const gone = await bad("path_not_found", "sandbox_fs_read", { name: "mcp-box", path: "/data/deep/note" });
  assert.equal(gone.errno, 2);

  await until("there is no sample", async () => (await good("sandbox_metrics", { name: "mcp-box" })).sandboxes.length === 1);
  await bad("volume_in_use", "volume_remove", { name: "mcp-data" });
  await good("sandbox_remove", { name: "mcp-box" });
  await bad("sandbox_not_found", "sandbox_inspect", { name: "mcp-box" });
  await good("volume_remove", { name: "mcp-data" });
  assert.deepEqual((await good("volume_list")).volumes, []);

  // A detached one outlives a stop.
  await good("sandbox_create", { name: "mcp-kept", image: "busybox", memory_mib: 256, detached: true });
  const stopped = await good("sandbox_stop", { name: "mcp-kept", force: true });
  assert.deepEqual([stopped.status, stopped.removed], ["stopped", false]);
  await good("sandbox_remove", { name: "mcp-kept" });
}

if (what === "check") {
  await check();
  await client.close();
} else {
  await good("sandbox_create", { name, image: "busybox", memory_mib: 256 });
  void client.callTool({ name: "sandbox_exec", arguments: { name, command: ["sleep", "600"], timeout_seconds: 3000 } }, undefined, PATIENCE);
  process.stdout.write("ready\n");
}
