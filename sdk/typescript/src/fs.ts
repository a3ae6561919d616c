/** Files of a sandbox: read, write, list and change them without a command inside. An error of the sandbox's system carries its `errno`. */

import { randomBytes } from "node:crypto";
import { createReadStream } from "node:fs";
import { open, rename, rm, stat } from "node:fs/promises";
import * as path from "node:path";

import type { Client } from "./client.js";
import { failure, MsbError, reason } from "./failure.js";
import { systemCode } from "./locate.js";
import type { DirectoryEntry, FileAttributes, WatchRecord } from "./models.js";

/** Most bytes that `read` keeps unless the caller says otherwise. A stream has no limit. */
export const READ_LEN_MAX = 64 << 20;
/** Bytes of a file of this machine that are read and sent at a time. */
const PIECE_LEN = 256 << 10;
/** The type of a file in its mode. */
const TYPE = 0o170000;

/** Whether attributes are a directory's. */
export const isDirectory = (attributes: FileAttributes): boolean => (attributes.mode & TYPE) === 0o040000;
/** Whether attributes are a regular file's. */
export const isFile = (attributes: FileAttributes): boolean => (attributes.mode & TYPE) === 0o100000;
/** Whether attributes are a symbolic link's. */
export const isSymlink = (attributes: FileAttributes): boolean => (attributes.mode & TYPE) === 0o120000;

/** The files of one sandbox, in the name of one of its users. Relative paths begin at `/`. */
export class Fs {
  constructor(
    private readonly client: Client,
    private readonly sandbox: string,
    private readonly user?: string,
  ) {}

  /** Acts as another user: `USER|UID[:GROUP|GID]`. */
  asUser(user: string): Fs {
    return new Fs(this.client, this.sandbox, user);
  }

  private call<T>(operation: string, args: Record<string, unknown>): Promise<T> {
    return this.client.fileCall<T>(this.sandbox, { operation, ...args }, this.user);
  }

  /** Reads a whole file of at most `lenMax` bytes. */
  async read(file: string, options: { lenMax?: number } = {}): Promise<Buffer> {
    const lenMax = options.lenMax ?? READ_LEN_MAX;
    const pieces: Buffer[] = [];
    let length = 0;
    for await (const piece of this.readStream(file)) {
      pieces.push(piece);
      length += piece.length;
      if (length > lenMax) {
        throw failure("limit_exceeded", `'${file}' has more than ${lenMax} bytes`, { hint: "read it as a stream, or raise lenMax" });
      }
    }
    return Buffer.concat(pieces);
  }

  /** Reads a whole file as UTF-8. */
  async readText(file: string, options: { lenMax?: number } = {}): Promise<string> {
    return (await this.read(file, options)).toString("utf8");
  }

  /** Reads a file, or a part of it, piece by piece. */
  readStream(file: string, part: { offset?: number; length?: number } = {}): AsyncGenerator<Buffer, void, void> {
    return this.client.fileContent(this.sandbox, file, this.user, part);
  }

  /** Writes a whole file: it appears under its name only when all of it is there. One that was there keeps mode and owner. */
  write(file: string, content: Uint8Array | string, options: { mode?: number } = {}): Promise<FileAttributes> {
    return this.writeStream(file, once(content), options);
  }

  /** As `write`, from a stream. An error of the stream ends it, and nothing is left behind. */
  writeStream(file: string, content: AsyncIterable<Uint8Array>, options: { mode?: number } = {}): Promise<FileAttributes> {
    return this.client.fileWrite(this.sandbox, file, content, this.user, options);
  }

  /** Adds to the end of a file, which is made if it does not exist. */
  append(file: string, content: Uint8Array | string): Promise<FileAttributes> {
    return this.client.fileWrite(this.sandbox, file, once(content), this.user, { append: true });
  }

  /** Attributes of a path; with `follow: false` a symbolic link is meant itself. */
  async stat(file: string, options: { follow?: boolean } = {}): Promise<FileAttributes> {
    const noFollow = options.follow === false;
    return (await this.call<{ attributes: FileAttributes }>("stat", { path: file, no_follow: noFollow })).attributes;
  }

  /** Whether there is anything at a path. */
  async exists(file: string): Promise<boolean> {
    try {
      await this.stat(file, { follow: false });
      return true;
    } catch (error) {
      if (error instanceof MsbError && error.code === "path_not_found" && error.errno !== undefined) return false;
      throw error;
    }
  }

  /** The entries of a directory, sorted by name. */
  async list(directory: string): Promise<DirectoryEntry[]> {
    return (await this.call<{ entries: DirectoryEntry[] }>("list", { path: directory })).entries;
  }

  /** Makes a directory; with `parents` also those above it, and one that exists is fine. */
  async mkdir(directory: string, options: { parents?: boolean; mode?: number } = {}): Promise<void> {
    await this.call("make_directory", { path: directory, parents: options.parents ?? false, mode: options.mode });
  }

  /** Removes a file or an empty directory, or with `recursive` whatever it is; links are not followed. */
  async remove(file: string, options: { recursive?: boolean } = {}): Promise<void> {
    await this.call("remove", { path: file, recursive: options.recursive ?? false });
  }

  /** Renames; a file that has the new name is replaced unless `replace` is false. */
  async rename(from: string, to: string, options: { replace?: boolean } = {}): Promise<void> {
    await this.call("rename", { from, to, no_replace: options.replace === false });
  }

  /** Makes a symbolic link at `file` that leads to `target`. */
  async symlink(target: string, file: string): Promise<void> {
    await this.call("symlink", { target, path: file });
  }

  /** Gives a file another name. */
  async hardLink(target: string, file: string): Promise<void> {
    await this.call("hard_link", { target, path: file });
  }

  /** What a symbolic link leads to. */
  async readLink(file: string): Promise<string> {
    return (await this.call<{ path: string }>("read_link", { path: file })).path;
  }

  /** The path without links, dots and doubled slashes. */
  async realPath(file: string): Promise<string> {
    return (await this.call<{ path: string }>("real_path", { path: file })).path;
  }

  /** Changes permission bits. */
  async chmod(file: string, mode: number): Promise<void> {
    await this.call("change", { path: file, change: { mode } });
  }

  /** Changes owner and group. */
  async chown(file: string, uid: number, gid: number): Promise<void> {
    await this.call("change", { path: file, change: { uid, gid } });
  }

  /** Cuts a file, or grows it with a hole. */
  async truncate(file: string, size: number): Promise<void> {
    await this.call("change", { path: file, change: { size } });
  }

  /** Watches a directory's entries or a file. The first record, `watching`, says that the watch is in place. */
  watch(file: string, options: { recursive?: boolean } = {}): AsyncGenerator<WatchRecord, void, void> {
    return this.client.fileWatch(this.sandbox, file, this.user, options.recursive ?? false);
  }

  /** Copies one file of this machine into the sandbox, with its permission bits; whole trees are `Sandbox.copyInto`'s. */
  async copyFromHost(source: string, target: string): Promise<FileAttributes> {
    const found = await stat(source).catch((error: unknown) => {
      throw localError(source, error);
    });
    return this.writeStream(target, createReadStream(source, { highWaterMark: PIECE_LEN }), { mode: found.mode & 0o7777 });
  }

  /** Copies one file of the sandbox to this machine. It is there whole or not at all. */
  copyToHost(source: string, target: string): Promise<void> {
    return writeWhole(this.readStream(source), target);
  }
}

async function* once(content: Uint8Array | string): AsyncGenerator<Uint8Array, void, void> {
  yield Buffer.from(content as Uint8Array);
}

/** The error of this machine's file system. */
export function localError(file: string, error: unknown): MsbError {
  if (error instanceof MsbError) return error;
  const codes: Record<string, string> = { EACCES: "permission_denied", EPERM: "permission_denied", ENOSPC: "disk_full", EEXIST: "path_exists" };
  const system = systemCode(error) ?? "";
  const code = codes[system] ?? (system === "ENOENT" || system === "ENOTDIR" ? "path_not_found" : "file_failed");
  return failure(code, `${file}: ${reason(error)}`, { cause: error });
}

/** Writes a file of this machine that is there whole or not at all. */
export async function writeWhole(content: AsyncIterable<Uint8Array>, target: string): Promise<void> {
  const temporary = path.join(path.dirname(target), `.${path.basename(target)}.${process.pid}-${randomBytes(4).toString("hex")}`);
  try {
    const file = await open(temporary, "wx");
    try {
      for await (const piece of content) await file.writeFile(piece);
    } finally {
      await file.close();
    }
    await rename(temporary, target);
  } catch (error) {
    await rm(temporary, { force: true });
    throw localError(target, error);
  }
}
