/** The base of every error of this package, and how an answer becomes one. The classes themselves are generated: `errors.ts`. */

/** What an error may carry beside its message. */
export interface FailureOptions {
  hint?: string;
  retryable?: boolean;
  details?: readonly string[];
  code?: string;
  errno?: number;
  cause?: unknown;
}

/** Why a call failed. Decide with `instanceof` (or on `code`); read `message` and `hint`. */
export class MsbError extends Error {
  /** The stable code; a newer service may send one that this version does not know. */
  readonly code: string;
  /** What to do about it. */
  readonly hint: string;
  /** Whether the same call can succeed later without a change. */
  readonly retryable: boolean;
  /** What belongs to the error beyond its text, such as the names of sandboxes that use an image. */
  readonly details: readonly string[];
  /** What the sandbox's system answered, for a file operation. */
  readonly errno: number | undefined;

  constructor(message: string, options: FailureOptions = {}) {
    super(message, options.cause === undefined ? {} : { cause: options.cause });
    this.name = new.target.name;
    this.code = options.code ?? "";
    this.hint = options.hint ?? "";
    this.retryable = options.retryable ?? false;
    this.details = options.details ?? [];
    this.errno = options.errno;
  }

  /** The value of a detail written `key=value`. */
  detail(key: string): string | undefined {
    return this.details.find((detail) => detail.startsWith(`${key}=`))?.slice(key.length + 1);
  }
}

/** A class of the table. */
export type ErrorClass = new (message: string, options?: FailureOptions) => MsbError;

const byCode = new Map<string, ErrorClass>();

/** Called by the generated module, once for each class. */
export function register(code: string, kind: ErrorClass): void {
  byCode.set(code, kind);
}

/** The error of a code, with the table's own hint unless another is given. */
export function failure(code: string, message: string, options: FailureOptions = {}): MsbError {
  const kind = byCode.get(code);
  return kind === undefined ? new MsbError(message, { ...options, code }) : new kind(message, options);
}

/** An answer that breaks the protocol. */
export function protocolError(what: unknown): MsbError {
  return failure("internal", `the service's answer cannot be understood: ${reason(what)}`);
}

/** What went wrong, in words. */
export function reason(error: unknown): string {
  return error instanceof Error ? error.message || error.name : String(error);
}

/** The error that a JSON value tells. */
export function errorFromValue(value: unknown, fallback: string): MsbError {
  if (typeof value !== "object" || value === null || !("message" in value) || typeof value.message !== "string") {
    return failure("internal", fallback);
  }
  const told = value as { code?: unknown; message: string; hint?: unknown; retryable?: unknown; details?: unknown; errno?: unknown };
  return failure(String(told.code), told.message, {
    ...(typeof told.hint === "string" ? { hint: told.hint } : {}),
    ...(typeof told.retryable === "boolean" ? { retryable: told.retryable } : {}),
    ...(typeof told.errno === "number" ? { errno: told.errno } : {}),
    ...(Array.isArray(told.details) ? { details: told.details.map(String) } : {}),
  });
}

/** The error of an answer that is no success. */
export function errorFromBody(status: number, body: string): MsbError {
  let value: unknown;
  try {
    value = JSON.parse(body);
  } catch {
    value = undefined;
  }
  return errorFromValue(value, `the service answered with status ${status}`);
}
