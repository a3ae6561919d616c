/**
 * Trees of this machine as tar streams, and back: as much of ustar and pax as `copy.ts` needs. What is read is never trusted: nothing is
 * made but what was asked for, nothing through a link, and no entry decides how much memory is used.
 */

import { randomBytes } from "node:crypto";
import { constants, type Stats } from "node:fs";
import { chmod, link, lstat, mkdir, open, readdir, readlink, rename, rm, symlink, utimes } from "node:fs/promises";
import * as path from "node:path";

import { failure } from "./failure.js";
import { systemCode } from "./locate.js";

const BLOCK = 512;
/** Bytes of a file that are read at a time. */
const PIECE_LEN = 64 << 10;
/** Longest path and longest extended header in a stream, in bytes, and most pieces of a file with holes. */
const PATH_LEN_MAX = 4096;
const EXTENSION_LEN_MAX = 1 << 20;
const PIECES_MAX = 1 << 16;

const refused = (what: string) => failure("invalid_archive", `the sandbox's tar stream cannot be taken: ${what}`);

function octal(value: number, width: number): string {
  return `${value.toString(8).padStart(width - 1, "0")}\0`;
}

function header(name: string, type: string, mode: number, size: number, mtime: number, linked: string): Buffer {
  const block = Buffer.alloc(BLOCK);
  block.write(name, 0, 100);
  block.write(octal(mode & 0o7777, 8) + octal(0, 8) + octal(0, 8) + octal(size, 12) + octal(Math.max(0, Math.floor(mtime)), 12), 100);
  block.write("        ", 148);
  block.write(type, 156);
  block.write(linked, 157, 100);
  block.write("ustar\x0000", 257);
  block.write(octal(block.reduce((sum, byte) => sum + byte, 0), 7), 148);
  return block;
}

const padding = (size: number): Buffer => Buffer.alloc((BLOCK - (size % BLOCK)) % BLOCK);

function record(key: string, value: string): string {
  const rest = ` ${key}=${value}\n`;
  let length = Buffer.byteLength(rest);
  while (String(length).length + Buffer.byteLength(rest) !== length) length = String(length).length + Buffer.byteLength(rest);
  return `${length}${rest}`;
}

/** The header blocks of an entry: a pax extension in front where ustar is too narrow. */
function* head(name: string, type: string, found: Stats, size: number, linked = ""): Generator<Buffer> {
  let extension = "";
  if (Buffer.byteLength(name) > 100) extension += record("path", name);
  if (Buffer.byteLength(linked) > 100) extension += record("linkpath", linked);
  if (size >= 8 ** 11) extension += record("size", String(size));
  if (extension !== "") {
    const bytes = Buffer.from(extension);
    yield Buffer.concat([header("pax", "x", 0o644, bytes.length, 0, ""), bytes, padding(bytes.length)]);
  }
  yield header(name, type, found.mode, size >= 8 ** 11 ? 0 : size, found.mtimeMs / 1000, linked);
}

/** Packs a tree whose root gets this name in the stream. What is no file, directory or link is left out, and told to `leftOut`. */
export async function* pack(source: string, name: string, leftOut: (line: string) => void): AsyncGenerator<Buffer, void, void> {
  yield* packEntry(source, name, leftOut);
  yield Buffer.alloc(2 * BLOCK);
}

async function* packEntry(source: string, name: string, leftOut: (line: string) => void): AsyncGenerator<Buffer, void, void> {
  const found = await lstat(source);
  if (found.isDirectory()) {
    yield* head(`${name}/`, "5", found, 0);
    for (const entry of (await readdir(source)).sort()) yield* packEntry(path.join(source, entry), `${name}/${entry}`, leftOut);
  } else if (found.isSymbolicLink()) {
    yield* head(name, "2", found, 0, await readlink(source));
  } else if (found.isFile()) {
    const file = await open(source, constants.O_RDONLY | constants.O_NOFOLLOW);
    try {
      yield* head(name, "0", found, found.size);
      let left = found.size;
      while (left > 0) {
        const { bytesRead, buffer } = await file.read(Buffer.alloc(Math.min(left, PIECE_LEN)), 0);
        // A file that shrank meanwhile is filled up, because its size is told already.
        yield bytesRead === 0 ? Buffer.alloc(Math.min(left, PIECE_LEN)) : buffer.subarray(0, bytesRead);
        left -= bytesRead === 0 ? Math.min(left, PIECE_LEN) : bytesRead;
      }
      yield padding(found.size);
    } finally {
      await file.close();
    }
  } else {
    leftOut(`${name}: no file, directory or link; left out`);
  }
}

/** Bytes of a stream in the sizes that are asked for. */
class Reader {
  private rest = Buffer.alloc(0);

  constructor(private readonly pieces: AsyncIterator<Buffer>) {}

  /** At most this many bytes, at least one; none at the end. */
  async some(length: number): Promise<Buffer | undefined> {
    while (this.rest.length === 0) {
      const next = await this.pieces.next();
      if (next.done === true) return undefined;
      this.rest = next.value as Buffer<ArrayBuffer>;
    }
    const piece = this.rest.subarray(0, length);
    this.rest = this.rest.subarray(piece.length);
    return piece;
  }

  /** Exactly this many, which are few. */
  async exactly(length: number): Promise<Buffer> {
    const whole: Buffer[] = [];
    for (let left = length; left > 0; ) {
      const piece = await this.some(left);
      if (piece === undefined) throw refused("it broke off");
      whole.push(piece);
      left -= piece.length;
    }
    return Buffer.concat(whole);
  }

  async skip(length: number): Promise<void> {
    for (let left = length; left > 0; ) left -= (await this.exactly(Math.min(left, PIECE_LEN))).length;
  }
}

interface Entry {
  name: string;
  type: string;
  mode: number;
  mtime: number;
  /** Bytes that follow in the stream. */
  size: number;
  linked: string;
  /** Of a file with holes: its size, and where its data begins with a list of pieces. */
  sparse?: number;
}

const text = (block: Buffer, from: number, length: number): string => {
  const field = block.subarray(from, from + length);
  const end = field.indexOf(0);
  return field.subarray(0, end === -1 ? length : end).toString("utf8");
};

function number(block: Buffer, from: number, length: number): number {
  if ((block[from] ?? 0) & 0x80) {
    const value = BigInt(`0x${block.subarray(from, from + length).toString("hex")}`) & ((1n << BigInt(length * 8 - 1)) - 1n);
    if (value > BigInt(Number.MAX_SAFE_INTEGER)) throw refused("a number is too large");
    return Number(value);
  }
  const digits = text(block, from, length).trim();
  if (!/^[0-7]*$/.test(digits)) throw refused("a header has no number where one belongs");
  return digits === "" ? 0 : Number.parseInt(digits, 8);
}

function extensions(bytes: Buffer): Map<string, string> {
  const found = new Map<string, string>();
  for (let rest = bytes; rest.length > 0; ) {
    const space = rest.indexOf(0x20);
    const length = Number(rest.subarray(0, Math.max(space, 0)).toString("latin1"));
    if (space < 1 || !Number.isInteger(length) || length <= space + 1 || length > rest.length) throw refused("an extended header is malformed");
    const [key, ...value] = rest.subarray(space + 1, length - 1).toString("utf8").split("=");
    found.set(key ?? "", value.join("="));
    rest = rest.subarray(length);
  }
  return found;
}

async function* entries(reader: Reader): AsyncGenerator<Entry, void, void> {
  let extended = new Map<string, string>();
  for (;;) {
    const block = await reader.exactly(BLOCK);
    if (block.every((byte) => byte === 0)) return;
    const sum = block.reduce((total, byte, index) => total + (index >= 148 && index < 156 ? 0x20 : byte), 0);
    if (sum !== number(block, 148, 8)) throw refused("a header's checksum is wrong");
    const type = String.fromCharCode(block[156] ?? 0);
    let size = number(block, 124, 12);
    if (["x", "g", "L", "K"].includes(type)) {
      if (size > EXTENSION_LEN_MAX) throw refused("an extended header is too long");
      const bytes = await reader.exactly(size);
      await reader.skip(padding(size).length);
      if (type === "x") extended = new Map([...extended, ...extensions(bytes)]);
      else if (type !== "g") extended.set(type === "L" ? "path" : "linkpath", text(bytes, 0, bytes.length));
      continue;
    }
    const prefix = text(block, 257, 5) === "ustar" ? text(block, 345, 155) : "";
    const short = text(block, 0, 100);
    const told = extended;
    extended = new Map();
    size = told.has("size") ? Number(told.get("size")) : size;
    if (!Number.isSafeInteger(size) || size < 0) throw refused("a size is no size");
    const sparse = told.has("GNU.sparse.realsize") ? Number(told.get("GNU.sparse.realsize")) : undefined;
    yield {
      name: told.get("GNU.sparse.name") ?? told.get("path") ?? (prefix === "" ? short : `${prefix}/${short}`),
      type: type === "\0" ? "0" : type,
      mode: number(block, 100, 8) & 0o777,
      mtime: Number(told.get("mtime") ?? number(block, 136, 12)) || 0,
      size: type === "0" || type === "\0" ? size : 0,
      linked: told.get("linkpath") ?? text(block, 157, 100),
      ...(sparse === undefined ? {} : { sparse }),
    };
    // Whoever takes an entry reads its content.
  }
}

/**
 * Makes the tree of a stream in a directory, under the one name that the stream may make, or without one in the directory itself. A name that is
 * free gets everything at once, at the end; what is there is filled file by file.
 */
export async function unpack(pieces: AsyncIterator<Buffer>, directory: string, name: string | undefined): Promise<void> {
  const reader = new Reader(pieces);
  const free = name !== undefined && (await kindOf(path.join(directory, name))) === undefined;
  const base = free ? path.join(directory, `.msb-copy-${randomBytes(8).toString("hex")}`) : directory;
  if (free) await mkdir(base, 0o700);
  try {
    const folders: { place: string; entry: Entry }[] = [];
    for await (const entry of entries(reader)) {
      const place = await inside(base, entry.name, name);
      if (place !== undefined) await make(reader, entry, place, base, name);
      if (place !== undefined && entry.type === "5") folders.push({ place, entry });
    }
    while ((await reader.some(PIECE_LEN)) !== undefined);
    // Last, and the deepest first: a mode may forbid what comes after it, and every new entry changes a folder's time.
    for (const { place, entry } of folders.reverse()) {
      await chmod(place, entry.mode);
      await utimes(place, entry.mtime, entry.mtime);
    }
    if (free) await rename(path.join(base, name), path.join(directory, name));
  } finally {
    if (free) await rm(base, { recursive: true, force: true });
  }
}

async function kindOf(place: string): Promise<Stats | undefined> {
  return lstat(place).catch((error: unknown) => {
    if (systemCode(error) === "ENOENT") return undefined;
    throw error;
  });
}

/** The place of an entry, whose folders are real ones; none for the root of a stream that fills its directory. */
async function inside(base: string, member: string, name: string | undefined): Promise<string | undefined> {
  const parts = member.split("/").filter((part) => part !== "" && part !== ".");
  const wrong = member.startsWith("/") || parts.includes("..") || member.includes("\0") || Buffer.byteLength(member) > PATH_LEN_MAX;
  if (wrong || (name !== undefined && parts[0] !== name)) throw refused(`${JSON.stringify(member.slice(0, 200))} was not asked for`);
  if (parts.length === 0) return undefined;
  let folder = base;
  for (const part of parts.slice(0, -1)) {
    folder = path.join(folder, part);
    if ((await kindOf(folder))?.isDirectory() !== true) {
      throw failure("path_exists", `a link or a file is where ${JSON.stringify(member.slice(0, 200))} needs a directory`);
    }
  }
  return path.join(folder, parts.at(-1) ?? "");
}

async function make(reader: Reader, entry: Entry, place: string, base: string, name: string | undefined): Promise<void> {
  const there = await kindOf(place);
  if (entry.type === "5") {
    if (there === undefined) await mkdir(place, 0o700);
    else if (!there.isDirectory()) throw failure("path_exists", `${place} is there, and is no directory`);
    return;
  }
  if (there?.isDirectory() === true) throw failure("path_exists", `${place} is a directory`);
  const temporary = `${place}.msb-${randomBytes(4).toString("hex")}`;
  try {
    if (entry.type === "2") {
      await symlink(entry.linked, temporary);
    } else if (entry.type === "1") {
      const target = await inside(base, entry.linked, name);
      if (target === undefined || (await kindOf(target))?.isFile() !== true) throw refused("a hard link leads to no file of the copy");
      await link(target, temporary);
    } else if (entry.type === "0") {
      await write(reader, entry, temporary);
    } else {
      // The agent leaves devices out; one that is sent all the same is not made.
      return;
    }
    await rename(temporary, place);
  } catch (error) {
    await rm(temporary, { force: true });
    throw error;
  }
}

async function write(reader: Reader, entry: Entry, place: string): Promise<void> {
  const file = await open(place, constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW, 0o600);
  try {
    let left = entry.size;
    let pieces: (readonly [number, number])[] = [[0, entry.size]];
    if (entry.sparse !== undefined) {
      const list = await sparseList(reader, entry.size);
      left -= list.length;
      pieces = list.pieces;
    }
    for (const [offset, length] of pieces) {
      for (let done = 0; done < length; ) {
        const piece = await reader.some(Math.min(length - done, PIECE_LEN));
        if (piece === undefined) throw refused("it broke off");
        for (let written = 0; written < piece.length; ) {
          written += (await file.write(piece, written, piece.length - written, offset + done + written)).bytesWritten;
        }
        done += piece.length;
      }
      left -= length;
    }
    if (left < 0) throw refused("a file has more pieces than bytes");
    await reader.skip(left + padding(entry.size).length);
    if (entry.sparse !== undefined) await file.truncate(entry.sparse);
    await file.chmod(entry.mode);
    await file.utimes(entry.mtime, entry.mtime);
  } finally {
    await file.close();
  }
}

/** The pieces of a file with holes (pax sparse format 1.0): numbers in lines, at the beginning of its data, in whole blocks. */
async function sparseList(reader: Reader, size: number): Promise<{ pieces: [number, number][]; length: number }> {
  let length = 0;
  let unread = "";
  const next = async (): Promise<number> => {
    while (!unread.includes("\n")) {
      if (length + BLOCK > size || unread.length > 32) throw refused("a list of pieces is malformed");
      unread += (await reader.exactly(BLOCK)).toString("latin1");
      length += BLOCK;
    }
    const end = unread.indexOf("\n");
    const value = Number(unread.slice(0, end));
    unread = unread.slice(end + 1);
    if (!Number.isSafeInteger(value) || value < 0) throw refused("a list of pieces is malformed");
    return value;
  };
  const count = await next();
  if (count > PIECES_MAX) throw refused("a file has too many pieces");
  const pieces: [number, number][] = [];
  for (let index = 0; index < count; index++) pieces.push([await next(), await next()]);
  return { pieces, length };
}
