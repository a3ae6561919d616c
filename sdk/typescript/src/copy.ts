/**
 * Copies of whole trees between this machine and a sandbox, as tar streams, by the rules of `docker cp`. A copy that fails leaves nothing
 * half-written under a final name.
 */

import { lstat, realpath, stat } from "node:fs/promises";
import * as path from "node:path";

import type { Client } from "./client.js";
import { failure, MsbError } from "./failure.js";
import { Fs, isDirectory, isSymlink, localError } from "./fs.js";
import { systemCode } from "./locate.js";
import type { ExecEvent, ExecHandle } from "./session.js";
import { pack, unpack } from "./tar.js";

/** Who copies if nobody is named: what is copied into a sandbox is its root's, as with docker. */
const USER = "0:0";
/** Most links that are followed to a destination (as in Linux). */
const LINKS_MAX = 40;
/** Most bytes of a sandbox's warnings that are kept. */
const WARNINGS_LEN_MAX = 64 << 10;

/** What a copy did. */
export interface CopyReport {
  /** Bytes of the stream: contents and headers. */
  bytes: number;
  /** What was left out, a line each. */
  warnings: string[];
}

/** What is at a path, links followed. */
type Found = "nothing" | "file" | "directory";

function baseName(file: string): string | undefined {
  const name = file.replace(/\/+$/, "").split("/").at(-1) ?? "";
  return name === "" || name === "." || name === ".." ? undefined : name;
}

/** In which directory a copy is made and under which name; without one the directory itself is filled. */
export function place(source: string, directory: boolean, destination: string, found: Found): { directory: string; name?: string } {
  const refuse = (code: string, why: string): MsbError => failure(code, `cannot copy to '${destination}': ${why}`);
  const named = (folder: string, name: string | undefined) => ({ directory: folder, ...(name === undefined ? {} : { name }) });
  if (found === "directory") return named(destination, baseName(source));
  if (found === "file" && directory) throw refuse("path_exists", "a file is there, and the source is a directory");
  if (found === "nothing" && !directory && destination.endsWith("/")) throw refuse("path_not_found", "the directory does not exist");
  const name = baseName(destination);
  if (name === undefined) throw refuse("path_not_found", "it does not exist");
  return named(destination.replace(/\/+$/, "").slice(0, -name.length) || ".", name);
}

class Warnings {
  private text = "";

  hear(event: ExecEvent): void {
    if (event.type === "stderr" && this.text.length < WARNINGS_LEN_MAX) this.text += event.data.toString("utf8");
  }

  lines(): string[] {
    return this.text.split("\n").filter((line) => line !== "");
  }
}

const brokenOff = (): MsbError => failure("exec_lost", "the tar stream broke off");

/** Copies a file or directory of this machine into a sandbox. */
export async function copyInto(client: Client, sandbox: string, source: string, target: string, user = USER): Promise<CopyReport> {
  const found = await lstat(source).catch((error: unknown) => {
    throw localError(source, error);
  });
  const files = new Fs(client, sandbox, user);
  const destination = await sandboxDestination(files, target);
  const where = place(source, found.isDirectory(), destination.path, destination.found);
  const handle = await client.archive(sandbox, { kind: "unpack", ...where }, user, true);
  const report: CopyReport = { bytes: 0, warnings: [] };
  const warnings = new Warnings();
  const hearing = (async () => {
    for await (const event of handle) {
      warnings.hear(event);
      if (event.type === "exited") return;
    }
    throw brokenOff();
  })();
  const sending = (async () => {
    for await (const piece of pack(source, where.name ?? ".", (line) => report.warnings.push(line))) {
      await handle.writeStdin(piece);
      report.bytes += piece.length;
    }
    await handle.closeStdin();
  })();
  try {
    // A stream that broke has nothing to say about why: the other side has.
    await Promise.race([hearing, sending]).catch((error: unknown) => {
      if (!(error instanceof MsbError && error.code === "exec_lost")) throw error;
    });
    await hearing;
  } catch (error) {
    throw localError(source, error);
  } finally {
    handle.close();
    await Promise.allSettled([hearing, sending]);
  }
  report.warnings.push(...warnings.lines());
  return report;
}

/** Copies a file or directory of a sandbox to this machine. */
export async function copyOut(client: Client, sandbox: string, source: string, target: string, user = USER): Promise<CopyReport> {
  const attributes = await new Fs(client, sandbox, user).stat(source, { follow: false });
  const destination = await hostDestination(target);
  const where = place(source, isDirectory(attributes), destination.path, destination.found);
  const folder = await stat(where.directory).catch((error: unknown) => {
    throw localError(where.directory, error);
  });
  if (!folder.isDirectory()) throw failure("path_not_found", `${where.directory} is no directory`);
  const handle = await client.archive(sandbox, { kind: "pack", path: source, name: where.name ?? "." }, user, false);
  const report: CopyReport = { bytes: 0, warnings: [] };
  const warnings = new Warnings();
  try {
    await unpack(output(handle, report, warnings), where.directory, where.name);
  } catch (error) {
    throw localError(target, error);
  } finally {
    handle.close();
  }
  report.warnings = warnings.lines();
  return report;
}

async function* output(handle: ExecHandle, report: CopyReport, warnings: Warnings): AsyncGenerator<Buffer, void, void> {
  for await (const event of handle) {
    warnings.hear(event);
    if (event.type === "exited") return;
    if (event.type !== "stdout") continue;
    report.bytes += event.data.length;
    yield event.data;
  }
  throw brokenOff();
}

/** The destination on this machine with links followed, and what is there. */
async function hostDestination(target: string): Promise<{ path: string; found: Found }> {
  try {
    const real = await realpath(target);
    return { path: real, found: (await stat(real)).isDirectory() ? "directory" : "file" };
  } catch (error) {
    if (systemCode(error) !== "ENOENT") throw localError(target, error);
    return { path: path.resolve(target) + (target.endsWith("/") ? "/" : ""), found: "nothing" };
  }
}

/** The destination in a sandbox with a link in its last component followed, and what is there. */
async function sandboxDestination(files: Fs, target: string): Promise<{ path: string; found: Found }> {
  let place = target;
  for (let links = 0; links < LINKS_MAX; links++) {
    let attributes;
    try {
      attributes = await files.stat(place, { follow: false });
    } catch (error) {
      if (error instanceof MsbError && error.code === "path_not_found") return { path: place, found: "nothing" };
      throw error;
    }
    if (!isSymlink(attributes)) return { path: place, found: isDirectory(attributes) ? "directory" : "file" };
    const linked = await files.readLink(place);
    place = linked.startsWith("/") ? linked : path.posix.join(path.posix.dirname(place.replace(/\/+$/, "")) || "/", linked);
  }
  throw failure("file_failed", `'${place}' leads through too many symbolic links`);
}
