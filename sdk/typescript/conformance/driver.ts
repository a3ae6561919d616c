/**
 * The TypeScript side of the conformance suite: reads calls as JSON lines, carries each out with the package, answers with JSON lines.
 *
 * Started by `cargo xtask test --only sdk`. It judges nothing: what is expected is written in `sdk/conformance/suite.json`.
 */

import { createInterface } from "node:readline";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";

import {
  Client,
  type ExecHandle,
  ExecOutput,
  type Fs,
  Image,
  isDirectory,
  isFile,
  isSymlink,
  type Mount,
  MsbError,
  type PullEvent,
  Sandbox,
  type SandboxDetail,
  type SandboxOptions,
  Volume,
  type VolumeDetail,
} from "msb";

// Arguments come from the suite; each call takes what it knows.
// eslint-disable-next-line @typescript-eslint/no-explicit-any
type Arguments = any;

let connected: Promise<Client> | undefined;
const held: ExecHandle[] = [];

async function client(): Promise<Client> {
  const pending = (connected ??= Client.connect());
  return pending.catch((error: unknown) => {
    connected = undefined;
    throw error;
  });
}

const sandbox = async (name: string): Promise<Sandbox> => Sandbox.get(name, { client: await client() });

function detailValue(detail: SandboxDetail): unknown {
  return {
    name: detail.name,
    status: detail.status,
    image: detail.image,
    labels: detail.labels,
    cause: detail.last_end?.cause ?? null,
    detached: detail.spec.detached,
    security: detail.spec.security,
    network: (detail.spec.network as Arguments).profile,
    rules: (detail.spec.network as Arguments).rules.length,
    ports: detail.ports.length,
    mounts: ((detail.spec.mounts as Arguments) ?? []).map((mount: Arguments) => mount.target),
  };
}

function outputValue(output: ExecOutput): unknown {
  return {
    exit_code: output.exitCode ?? null,
    signal: output.signal ?? null,
    timed_out: output.timedOut,
    stdout: output.stdoutText,
    stderr: output.stderrText,
  };
}

function createOptions(args: Arguments): SandboxOptions {
  const names: Record<string, string> = {
    memory_mib: "memoryMib",
    idle_timeout_ms: "idleTimeoutMs",
    max_duration_ms: "maxDurationMs",
    stop_grace_ms: "stopGraceMs",
    stop_signal: "stopSignal",
    max_retries: "maxRetries",
  };
  const entries = Object.entries(args).filter(([key]) => !["name", "mounts", "root_directory"].includes(key));
  if (args.root_directory !== undefined) entries.push(["image", Image.bind(args.root_directory)]);
  if (args.mounts !== undefined) entries.push(["mounts", args.mounts.map(mountOf)]);
  return Object.fromEntries(entries.map(([key, value]) => [names[key] ?? key, value])) as unknown as SandboxOptions;
}

function mountOf(args: Arguments): Mount {
  const options = { readOnly: args.read_only ?? false };
  if (args.kind === "bind") return Volume.bind(args.path, args.target, options);
  return args.kind === "named" ? Volume.named(args.name, args.target, options) : Volume.tmpfs(args.target, { sizeMib: args.size_mib });
}

const volumeValue = (found: VolumeDetail): unknown => ({
  name: found.name,
  kind: found.kind,
  size_bytes: found.size_bytes ?? null,
  users: found.users.map((user) => user.sandbox),
});

const fs = async (args: Arguments): Promise<Fs> => (await sandbox(args.name)).fs;

function execOptions(args: Arguments): Record<string, unknown> {
  const { name: _name, command: _command, actions: _actions, timeout_ms, output_len_max, terminal, ...rest } = args;
  return {
    ...rest,
    ...(timeout_ms === undefined ? {} : { timeoutMs: timeout_ms }),
    ...(output_len_max === undefined ? {} : { outputLenMax: output_len_max }),
    ...(terminal === undefined ? {} : { terminal: { rows: terminal[0], columns: terminal[1] } }),
  };
}

async function act(handle: ExecHandle, action: Arguments): Promise<void> {
  if (action.resize !== undefined) await handle.resize(action.resize[0], action.resize[1]);
  if (action.write !== undefined) await handle.writeStdin(action.write);
  if (action.signal !== undefined) await handle.signal(action.signal);
  if (action.close_stdin) await handle.closeStdin();
}

async function on(name: string, what: (found: Sandbox) => Promise<unknown>): Promise<unknown> {
  const found = await sandbox(name);
  await what(found);
  return detailValue(found.detail);
}

const calls: Record<string, (args: Arguments) => Promise<unknown>> = {
  connect: async () => ({ api_version: (await client()).version.api_version }),
  shutdown: async () => (await client()).shutdown(),
  // Without a client, so that a refusal comes before any connection.
  create: async (args) => detailValue((await Sandbox.create(args.name, createOptions(args))).detail),
  get: async (args) => detailValue((await sandbox(args.name)).detail),
  list: async (args) =>
    (await Sandbox.list({ labels: args.labels ?? [], selector: args.selector, client: await client() })).map((found) => found.name),
  pages: async (args) => {
    const pages: string[][] = [];
    for (let after: string | undefined; ; ) {
      const page = await Sandbox.listPage({ labels: args.labels ?? [], limit: args.limit, after, client: await client() });
      pages.push(page.sandboxes.map((found) => found.name));
      if (page.next === undefined) return pages;
      after = page.next;
    }
  },
  ping: async (args) => (await (await sandbox(args.name)).ping()).round_trip_us > 0,
  ssh_config: async (args) => (await sandbox(args.name)).sshConfig(args.alias === undefined ? {} : { alias: args.alias }),
  metrics_stream: async (args) => {
    const names: string[] = [];
    for await (const sample of (await sandbox(args.name)).metricsStream({ intervalMs: args.interval_ms })) {
      if (names.push(sample.name) === args.count) break;
    }
    return names;
  },
  metrics_history: async (args) => {
    const history = await (await sandbox(args.name)).metricsHistory();
    return { name: history.name, has_points: history.points.length > 0 };
  },
  copy_into: async (args) => (await (await sandbox(args.name)).copyInto(args.path, args.target)).warnings,
  copy_out: async (args) => (await (await sandbox(args.name)).copyOut(args.path, args.target)).warnings,
  fs_mkdir: async (args) => (await fs(args)).mkdir(args.path, { parents: args.parents ?? false }),
  fs_write: async (args) => (await fs(args)).write(args.path, args.content, args.mode === undefined ? {} : { mode: args.mode }),
  fs_append: async (args) => (await fs(args)).append(args.path, args.content),
  fs_read: async (args) => {
    if (args.offset === undefined) return (await fs(args)).readText(args.path);
    let content = "";
    for await (const piece of (await fs(args)).readStream(args.path, { offset: args.offset, length: args.length })) content += piece.toString();
    return content;
  },
  fs_stat: async (args) => {
    const found = await (await fs(args)).stat(args.path, { follow: args.follow ?? true });
    const kind = isSymlink(found) ? "symlink" : isFile(found) ? "file" : isDirectory(found) ? "directory" : "other";
    return { kind, size: found.size, mode: found.mode & 0o7777 };
  },
  fs_chmod: async (args) => (await fs(args)).chmod(args.path, args.mode),
  fs_symlink: async (args) => (await fs(args)).symlink(args.target, args.path),
  fs_read_link: async (args) => (await fs(args)).readLink(args.path),
  fs_real_path: async (args) => (await fs(args)).realPath(args.path),
  fs_list: async (args) => (await (await fs(args)).list(args.path)).map((entry) => entry.name),
  fs_rename: async (args) => (await fs(args)).rename(args.path, args.target),
  fs_exists: async (args) => (await fs(args)).exists(args.path),
  fs_watch: async (args) => {
    const files = await fs(args);
    for await (const record of files.watch(args.path)) {
      if (record.type === "watching") await files.append(args.touch, "seen");
      else if (record.kind === "created") return record.path;
    }
    throw new Error("a watch without an end");
  },
  fs_remove: async (args) => (await fs(args)).remove(args.path, { recursive: args.recursive ?? false }),
  volume_create: async (args) =>
    volumeValue(await Volume.create(args.name, { kind: args.kind ?? "dir", sizeMib: args.size_mib, client: await client() })),
  volume_get: async (args) => volumeValue(await Volume.get(args.name, { client: await client() })),
  volume_list: async () => (await Volume.list({ client: await client() })).map((found) => found.name),
  volume_remove: async (args) => Volume.remove(args.name, { client: await client() }),
  image_tag: async (args) => (await Image.tag(args.reference, args.tag, { client: await client() })).references,
  image_save: async (args) => Image.save(args.reference, args.path, { client: await client() }),
  image_prune: async (args) => Image.prune({ dryRun: args.dry_run ?? false, client: await client() }),
  image_pull: async (args) => {
    const steps: string[] = [];
    const progress = (event: PullEvent): unknown => steps.push(event.type);
    const image = await Image.pull(args.reference, { insecure: true, progress, client: await client() });
    return { references: image.references, steps };
  },
  exec: async (args) => outputValue(await (await sandbox(args.name)).exec(args.command, execOptions(args))),
  exec_check: async (args) => {
    (await (await sandbox(args.name)).exec(args.command, execOptions(args))).check();
  },
  shell: async (args) => outputValue(await (await sandbox(args.name)).shell(args.script)),
  exec_many: async (args) => {
    const found = await sandbox(args.name);
    let good = 0;
    for (let index = 0; index < args.count; index++) good += (await found.exec(["true"])).success ? 1 : 0;
    return good;
  },
  settle: async () => {
    setFlagsFromString("--expose-gc");
    (runInNewContext("gc") as () => void)();
  },
  first_byte: async (args) => {
    const on = { client: await client() };
    const began = performance.now();
    const found = await Sandbox.create(undefined, { image: args.image, ephemeral: true, ...on });
    await using handle = await found.execStream(["echo", "x"]);
    for await (const event of handle) if (event.type === "stdout") break;
    const took = performance.now() - began;
    await found.remove({ force: true });
    return took;
  },
  exec_stream: async (args) => {
    const actions: Arguments[] = [...(args.actions ?? [])];
    await using handle = await (await sandbox(args.name)).execStream(args.command, execOptions(args));
    const out: Buffer[] = [];
    const err: Buffer[] = [];
    for await (const event of handle) {
      if (event.type === "stdout") out.push(event.data);
      else if (event.type === "stderr") err.push(event.data);
      else if (event.type === "exited") return outputValue(new ExecOutput(event.end, Buffer.concat(out), Buffer.concat(err)));
      while (actions.length > 0 && Buffer.concat(out).includes(actions[0].after ?? "")) await act(handle, actions.shift());
    }
    throw new Error("a stream without an end");
  },
  exec_hold: async (args) => {
    const handle = await (await sandbox(args.name)).execStream(args.command);
    held.push(handle);
    await handle[Symbol.asyncIterator]().next();
  },
  logs: async ({ name, ...query }) => {
    let text = "";
    for await (const record of (await sandbox(name)).logs(query)) text += record.data;
    return text;
  },
  events: async (args) => {
    const states: string[] = [];
    for await (const event of (await sandbox(args.name)).events()) if (event.event === "state") states.push(event.state);
    return states;
  },
  metrics: async (args) => {
    const sample = await (await sandbox(args.name)).metrics();
    return sample === undefined ? null : { name: sample.name, status: sample.status };
  },
  start: async (args) => detailValue((await Sandbox.start(args.name, { client: await client() })).detail),
  touch: (args) => on(args.name, (found) => found.touch()),
  detach: (args) => on(args.name, (found) => found.detach()),
  stop: (args) => on(args.name, (found) => found.stop(args.grace_ms === undefined ? {} : { graceMs: args.grace_ms })),
  kill: (args) => on(args.name, (found) => found.kill()),
  restart: (args) => on(args.name, (found) => found.restart()),
  wait: (args) => on(args.name, (found) => found.waitUntilStopped()),
  remove: async (args) => Sandbox.remove(args.name, { force: args.force ?? false, client: await client() }),
  image_load: async (args) => (await Image.load(args.path, { client: await client() })).map((image) => image.references),
  image_list: async () =>
    (await Image.list({ client: await client() })).map((image) => image.references[0] ?? image.digest),
  image_inspect: async (args) => {
    const image = await Image.inspect(args.reference, { client: await client() });
    return {
      references: image.references,
      layers: image.layers,
      layer_details: image.layer_details.length,
      user: image.config.user,
      working_dir: image.config.working_dir,
      used_by: image.used_by,
    };
  },
  image_remove: async (args) => Image.remove(args.reference, { force: args.force ?? false, client: await client() }),
};

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line) as { call: string; args?: Arguments };
  let answer: unknown;
  try {
    answer = { ok: (await calls[request.call]?.(request.args ?? {})) ?? null };
  } catch (error) {
    if (!(error instanceof MsbError)) throw error;
    const { code, message, hint, details, errno } = error;
    answer = { error: code, kind: error.constructor.name, message, hint, details, errno: errno ?? null };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
process.exit(0);
