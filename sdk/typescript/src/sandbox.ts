/** A sandbox as a value: what `Client` does by name, as methods. */

import { Client, type EventQuery, type ListQuery, type LogQuery } from "./client.js";
import { copyInto, copyOut, type CopyReport } from "./copy.js";
import { SandboxNotFoundError } from "./errors.js";
import { Fs } from "./fs.js";
import type {
  EventRecord,
  LogRecord,
  MetricsHistory,
  PingReport,
  SandboxDetail,
  SandboxMetrics,
  SandboxPage,
  SandboxState,
  SandboxSummary,
  SshConfig,
} from "./models.js";
import { type ExecHandle, type ExecOutput, OUTPUT_LEN_MAX } from "./session.js";
import { createRequest, type ExecOptions, execRequest, milliseconds, type SandboxOptions } from "./spec.js";
import { sshConfig } from "./ssh.js";

/** Where the service is; the one of this environment if absent. */
export interface On {
  client?: Client;
}

/** How a command that runs to its end is run. */
export interface CollectOptions extends ExecOptions {
  /** Its whole stdin. */
  stdin?: Uint8Array | string;
  /** Most output that is kept, in bytes. */
  outputLenMax?: number;
}

/**
 * A sandbox of a service. Dropping the object does nothing to the sandbox; one that is not `detached` ends with this process. With
 * `await using` it is stopped and removed at the end of the block.
 */
export class Sandbox implements AsyncDisposable {
  private constructor(
    readonly client: Client,
    private known: SandboxDetail,
  ) {}

  /** Creates and boots a sandbox. Without a name the service chooses one. */
  static async create(name: string | undefined, options: SandboxOptions & On): Promise<Sandbox> {
    const request = createRequest(name, options);
    const client = options.client ?? (await Client.connect());
    return new Sandbox(client, await client.create(request));
  }

  /** The sandbox of this name. */
  static async get(name: string, on: On = {}): Promise<Sandbox> {
    const client = on.client ?? (await Client.connect());
    return new Sandbox(client, await client.inspect(name));
  }

  /** The sandboxes whose labels fit every term (`KEY=VALUE` or `KEY`) and the selector, newest first. */
  static async list(filter: ListQuery & On = {}): Promise<SandboxSummary[]> {
    return (filter.client ?? (await Client.connect())).list(filter);
  }

  /** A page of them; its `next`, if there is one, is the next page's `after`. */
  static async listPage(filter: ListQuery & { limit: number } & On): Promise<SandboxPage> {
    return (filter.client ?? (await Client.connect())).listPage(filter);
  }

  /** Starts a resting sandbox. */
  static async start(name: string, on: On = {}): Promise<Sandbox> {
    const client = on.client ?? (await Client.connect());
    return new Sandbox(client, await client.start(name));
  }

  /** Removes a sandbox; `force` kills it first. */
  static async remove(name: string, options: { force?: boolean } & On = {}): Promise<void> {
    await (options.client ?? (await Client.connect())).remove(name, options.force);
  }

  /** Its name. */
  get name(): string {
    return this.known.name;
  }

  /** Its state at the last call that answered with it. */
  get status(): SandboxState {
    return this.known.status;
  }

  /** What was known at that call. */
  get detail(): SandboxDetail {
    return this.known;
  }

  /** Asks anew. */
  async refresh(): Promise<SandboxDetail> {
    return (this.known = await this.client.inspect(this.name));
  }

  /** Runs a command to its end and keeps its output. A command that fails is no error: see `ExecOutput.check`. */
  async exec(command: readonly string[], options: CollectOptions = {}): Promise<ExecOutput> {
    const handle = await this.client.exec(this.name, execRequest(command, options.stdin !== undefined, options));
    return handle.collect(options.stdin, options.outputLenMax ?? OUTPUT_LEN_MAX);
  }

  /** Runs a command as a stream of events. */
  async execStream(command: readonly string[], options: ExecOptions & { stdin?: boolean } = {}): Promise<ExecHandle> {
    return this.client.exec(this.name, execRequest(command, options.stdin ?? false, options));
  }

  /** Runs a line of the sandbox's own shell. */
  shell(script: string, options: CollectOptions = {}): Promise<ExecOutput> {
    return this.exec(["/bin/sh", "-c", script], options);
  }

  /** Watches the main workload. */
  attach(options: { stdin?: boolean } = {}): Promise<ExecHandle> {
    return this.client.attach(this.name, options.stdin);
  }

  /** Reads its log; with `follow` until it rests. */
  logs(query: LogQuery = {}): AsyncGenerator<LogRecord, void, void> {
    return this.client.logs(this.name, query);
  }

  /** What happened to it. */
  async *events(query: EventQuery = {}): AsyncGenerator<EventRecord, void, void> {
    for await (const event of this.client.events(query)) if (event.sandbox_id === this.known.id) yield event;
  }

  /** Its newest sample; `undefined` when it has none because it rests. */
  async metrics(): Promise<SandboxMetrics | undefined> {
    return (await this.client.metrics({ name: this.name })).sandboxes.find((sample) => sample.id === this.known.id);
  }

  /** Its samples from now on, one at each interval (100 ms to an hour), the first at once. */
  async *metricsStream(options: { intervalMs?: number } = {}): AsyncGenerator<SandboxMetrics, void, void> {
    for await (const snapshot of this.client.metricsStream({ name: this.name, ...options })) {
      for (const sample of snapshot.sandboxes) if (sample.id === this.known.id) yield sample;
    }
  }

  /** Its last hour, or a part of it. */
  metricsHistory(query: { lastMs?: number; pointsMax?: number } = {}): Promise<MetricsHistory> {
    return this.client.metricsHistory(this.name, query);
  }

  /** Its files. */
  get fs(): Fs {
    return new Fs(this.client, this.name);
  }

  /** Copies a file or directory of this machine into it, by the rules of `docker cp`. */
  copyInto(source: string, target: string, options: { user?: string } = {}): Promise<CopyReport> {
    return copyInto(this.client, this.name, source, target, options.user);
  }

  /** Copies a file or directory of it to this machine, by the rules of `docker cp`. */
  copyOut(source: string, target: string, options: { user?: string } = {}): Promise<CopyReport> {
    return copyOut(this.client, this.name, source, target, options.user);
  }

  /** What makes `ssh msb-NAME` (or another alias) work. */
  async sshConfig(options: { alias?: string } = {}): Promise<SshConfig> {
    return sshConfig(await this.client.sshHost(this.name), options.alias);
  }

  /** Asks its agent for a sign of life. It is no activity, and wakes nothing. */
  ping(): Promise<PingReport> {
    return this.client.ping(this.name);
  }

  /** Counts as activity. */
  async touch(): Promise<void> {
    this.known = await this.client.touch(this.name);
  }

  /** Lets it outlive this process. */
  async detach(): Promise<void> {
    this.known = await this.client.detach(this.name);
  }

  /** Stops it: stop signal, its own grace time unless one is given, flush. */
  async stop(options: { graceMs?: number } = {}): Promise<void> {
    const graceMs = options.graceMs === undefined ? {} : { graceMs: milliseconds(options.graceMs, "graceMs") };
    this.known = await this.client.stop(this.name, graceMs);
  }

  /** Ends it at once, without a flush. */
  async kill(): Promise<void> {
    this.known = await this.client.stop(this.name, { force: true });
  }

  /** Stops it if it runs, and starts it. */
  async restart(): Promise<void> {
    this.known = await this.client.restart(this.name);
  }

  /** Waits until it rests. */
  async waitUntilStopped(): Promise<SandboxDetail> {
    return (this.known = await this.client.wait(this.name));
  }

  /** Removes it; `force` kills it first. */
  async remove(options: { force?: boolean } = {}): Promise<void> {
    await this.client.remove(this.name, options.force);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      await this.remove({ force: true });
    } catch (error) {
      // Somebody else removed it, or it was ephemeral and has ended.
      if (!(error instanceof SandboxNotFoundError)) throw error;
    }
  }
}
