/**
 * A running command: its output as an async iterable, its stdin within the service's credit, its signals.
 *
 * A caller that stops reading stops the command's output; nothing grows. Closing the handle ends an exec, never a main workload.
 */

import { createConnection } from "node:net";
import { constants } from "node:os";

import { WebSocket } from "ws";

import { errorFromBody, errorFromValue, failure, type MsbError, protocolError, reason } from "./failure.js";
import { cannotConnect } from "./locate.js";
import type { ProcessEnd } from "./models.js";

/** Bytes of stdin that may be sent before the service grants more. */
const STDIN_WINDOW = 256 << 10;
/** Most credit that is ever kept, in bytes. */
const WINDOW_MAX = 64 << 20;
/** Most stdin in one message, in bytes. */
const PIECE_LEN = 64 << 10;
/** Largest message that is read, in bytes. */
const MESSAGE_LEN_MAX = 8 << 20;
/** Bytes that may wait for a slow reader before the service is held back. */
const QUEUE_LEN = 1 << 20;
/** Largest body of a refusal, in bytes. */
const REFUSAL_LEN_MAX = 1 << 20;
/** Most output that `exec` keeps unless the caller says otherwise, in bytes. A stream has no limit. */
export const OUTPUT_LEN_MAX = 64 << 20;

/** Something that happened to a running command. */
export type ExecEvent =
  | { type: "started"; pid: number }
  | { type: "stdout"; data: Buffer }
  | { type: "stderr"; data: Buffer }
  | { type: "output_lost"; bytes: number }
  | { type: "exited"; end: ProcessEnd };

/** What came out of a command. */
export class ExecOutput {
  constructor(
    readonly end: ProcessEnd,
    readonly stdout: Buffer,
    readonly stderr: Buffer,
  ) {}

  /** Its exit code; `undefined` when a signal killed it. */
  get exitCode(): number | undefined {
    return this.end.code;
  }

  /** The signal that killed it, if one did. */
  get signal(): number | undefined {
    return this.end.signal;
  }

  /** Whether it was killed at its timeout. */
  get timedOut(): boolean {
    return this.end.timed_out;
  }

  /** Whether it ended with code 0. */
  get success(): boolean {
    return this.end.code === 0 && !this.end.timed_out;
  }

  /** Its standard output as text; bytes that are no UTF-8 are replaced. */
  get stdoutText(): string {
    return this.stdout.toString("utf8");
  }

  /** Its standard error as text; bytes that are no UTF-8 are replaced. */
  get stderrText(): string {
    return this.stderr.toString("utf8");
  }

  /** Itself if it ended well; else throws `ExecTimeoutError` or `CommandFailedError`. */
  check(): this {
    if (this.end.timed_out) throw failure("exec_timeout", "the command ran longer than its timeout and was killed");
    if (!this.success) {
      const how = this.end.code === undefined ? `signal ${this.end.signal}` : `code ${this.end.code}`;
      throw failure("command_failed", `the command ended with ${how}`, {
        details: this.stderrText.trimEnd().split("\n").slice(-20),
      });
    }
    return this;
  }
}

function signalNumber(which: number | NodeJS.Signals): number {
  if (typeof which === "number") return which;
  const number = constants.signals[which];
  if (number === undefined) throw failure("invalid_config", `${which} is no signal`);
  return number;
}

/** A running command: iterate over its events, or `wait` for its end. */
export class ExecHandle implements AsyncIterable<ExecEvent>, AsyncDisposable {
  private readonly queue: ExecEvent[] = [];
  private queued = 0;
  private trouble: MsbError | undefined;
  private over = false;
  private credit = STDIN_WINDOW;
  private wakeReader: (() => void) | undefined;
  private readonly creditWaiters: (() => void)[] = [];

  private constructor(
    private readonly socket: WebSocket,
    private readonly stdin: boolean,
  ) {
    socket.on("message", (data: Buffer, binary: boolean) => {
      try {
        this.take(data, binary);
      } catch (error) {
        this.fail(protocolError(error));
      }
    });
    socket.on("close", () => this.fail(lost("the service closed it")));
    socket.on("error", (error) => this.fail(lost(error)));
  }

  /** Opens a WebSocket on `target` and sends the first message. */
  static open(socketPath: string, target: string, first: unknown, stdin: boolean): Promise<ExecHandle> {
    return new Promise((resolve, reject) => {
      const socket = new WebSocket(`ws://msbd${target}`, {
        createConnection: () => createConnection(socketPath),
        perMessageDeflate: false,
        maxPayload: MESSAGE_LEN_MAX,
      });
      let refused = false;
      const early = (error: Error): void => {
        if (!refused) reject(cannotConnect(socketPath, error));
      };
      socket.once("error", early);
      socket.once("unexpected-response", (_request, response) => {
        refused = true;
        let body = "";
        response.setEncoding("utf8");
        response.on("data", (piece: string) => {
          if (body.length < REFUSAL_LEN_MAX) body += piece;
        });
        response.on("end", () => {
          reject(errorFromBody(response.statusCode ?? 0, body));
          socket.terminate();
        });
        response.on("error", (error) => reject(lost(error)));
      });
      socket.once("open", () => {
        // The listeners of the handle are there before the first message can arrive.
        const handle = new ExecHandle(socket, stdin);
        socket.off("error", early);
        handle.send(first).then(() => resolve(handle), reject);
      });
    });
  }

  private take(data: Buffer, binary: boolean): void {
    if (binary) {
      if (data[0] === 1) this.push({ type: "stdout", data: data.subarray(1) }, data.length);
      else if (data[0] === 2) this.push({ type: "stderr", data: data.subarray(1) }, data.length);
      else this.fail(protocolError("output of an unknown kind"));
      return;
    }
    const message = JSON.parse(data.toString("utf8")) as
      | { type: "started"; pid: number }
      | { type: "stdin_credit"; bytes: number }
      | { type: "output_lost"; bytes: number }
      | { type: "exited"; end: ProcessEnd }
      | { type: "error"; error: unknown };
    switch (message.type) {
      case "stdin_credit":
        this.credit = Math.min(this.credit + Number(message.bytes), WINDOW_MAX);
        this.wakeWriters();
        break;
      case "started":
      case "output_lost":
        this.push(message, 0);
        break;
      case "exited":
        this.push(message, 0);
        this.end();
        break;
      case "error":
        this.fail(errorFromValue(message.error, "the command failed"));
        break;
      // What a newer service says beyond this is not for us.
    }
  }

  private push(event: ExecEvent, length: number): void {
    if (this.over) return;
    this.queue.push(event);
    this.queued += length;
    if (this.queued > QUEUE_LEN) this.socket.pause();
    this.wakeReader?.();
  }

  private fail(error: MsbError): void {
    if (this.over) return;
    this.trouble = error;
    this.end();
  }

  private end(): void {
    this.over = true;
    this.socket.terminate();
    this.wakeReader?.();
    this.wakeWriters();
  }

  private wakeWriters(): void {
    for (const wake of this.creditWaiters.splice(0)) wake();
  }

  private async next(): Promise<ExecEvent | undefined> {
    for (;;) {
      const event = this.queue.shift();
      if (event !== undefined) {
        if (event.type === "stdout" || event.type === "stderr") this.queued -= event.data.length + 1;
        if (this.queued <= QUEUE_LEN && this.socket.isPaused) this.socket.resume();
        return event;
      }
      if (this.trouble !== undefined) {
        const error = this.trouble;
        this.trouble = undefined;
        throw error;
      }
      if (this.over) return undefined;
      await new Promise<void>((resolve) => (this.wakeReader = resolve));
      this.wakeReader = undefined;
    }
  }

  /** What happens until the end. One reader at a time. */
  async *[Symbol.asyncIterator](): AsyncGenerator<ExecEvent, void, void> {
    for (let event = await this.next(); event !== undefined; event = await this.next()) yield event;
  }

  private write(data: Buffer | string): Promise<void> {
    return new Promise((resolve, reject) => {
      if (this.over) return reject(failure("exec_lost", "the command has ended"));
      this.socket.send(data, { binary: typeof data !== "string" }, (error) => (error ? reject(lost(error)) : resolve()));
    });
  }

  private send(message: unknown): Promise<void> {
    return this.write(JSON.stringify(message));
  }

  /** Writes to the command's stdin, waiting while it does not read. Somebody must iterate meanwhile. */
  async writeStdin(data: Uint8Array | string): Promise<void> {
    if (!this.stdin) throw failure("invalid_config", "the command was started without stdin");
    let rest = Buffer.from(data as Uint8Array);
    while (rest.length > 0) {
      while (this.credit === 0 && !this.over) await new Promise<void>((resolve) => this.creditWaiters.push(resolve));
      const now = Math.min(rest.length, this.credit, PIECE_LEN);
      this.credit -= now;
      await this.write(rest.subarray(0, now));
      rest = rest.subarray(now);
    }
  }

  /** Ends stdin: the command reads end of file. */
  closeStdin(): Promise<void> {
    return this.send({ type: "stdin_eof" });
  }

  /** Sends a signal to the command's process group. */
  async signal(which: number | NodeJS.Signals): Promise<void> {
    await this.send({ type: "signal", number: signalNumber(which) });
  }

  /** Sends SIGKILL. */
  kill(): Promise<void> {
    return this.signal("SIGKILL");
  }

  /** Tells the command its terminal's size. */
  resize(rows: number, columns: number): Promise<void> {
    return this.send({ type: "resize", size: { rows, columns } });
  }

  /** Waits for its end; output is read and thrown away. */
  async wait(): Promise<ProcessEnd> {
    for await (const event of this) if (event.type === "exited") return event.end;
    throw failure("exec_lost", "the command has ended before");
  }

  /** Writes `stdin`, reads to the end and gives back everything. */
  async collect(stdin?: Uint8Array | string, outputLenMax: number = OUTPUT_LEN_MAX): Promise<ExecOutput> {
    if (this.stdin) {
      // A command may end without reading its stdin: that is its right, and its end is what counts.
      this.writeStdin(stdin ?? "")
        .then(() => this.closeStdin())
        .catch(() => undefined);
    }
    const output = { stdout: [] as Buffer[], stderr: [] as Buffer[] };
    let length = 0;
    try {
      for await (const event of this) {
        if (event.type === "exited") {
          return new ExecOutput(event.end, Buffer.concat(output.stdout), Buffer.concat(output.stderr));
        }
        if (event.type !== "stdout" && event.type !== "stderr") continue;
        output[event.type].push(event.data);
        length += event.data.length;
        if (length > outputLenMax) {
          const hint = "read it with execStream, or raise outputLenMax";
          throw failure("limit_exceeded", `the command wrote more than ${outputLenMax} bytes`, { hint });
        }
      }
    } finally {
      this.close();
    }
    throw failure("exec_lost", "the command has ended before");
  }

  /** Ends the stream, and with it an exec that still runs. */
  close(): void {
    if (!this.over) this.end();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.close();
  }
}

function lost(error: unknown): MsbError {
  return failure("exec_lost", `the connection to the running command was lost: ${reason(error)}`);
}
