package msb

import (
	"encoding/json"
	"fmt"
	"strings"
	"syscall"
)

// Code is the stable code of an error. Every code this version knows is a sentinel of errors.Is as well: ErrImageInUse and so on.
type Code string

// Error is why a call failed. Decide with errors.Is on the sentinels, read Message and Hint.
type Error struct {
	// Code is the stable code; a newer service may send one that this version does not know.
	Code Code
	// Message says what happened, for people.
	Message string
	// Hint says what to do about it.
	Hint string
	// Retryable says whether the same call can succeed later without a change.
	Retryable bool
	// Details belong to the error beyond its text, such as the names of sandboxes that use an image.
	Details []string
	// Errno is what the sandbox's system answered, for a file operation; 0 if it is none.
	Errno syscall.Errno
	// Cause is the error below it, if there is one.
	Cause error
}

// Error gives the message.
func (e *Error) Error() string {
	if e.Message == "" {
		return table[e.Code].meaning
	}
	return e.Message
}

// Unwrap gives the error below it.
func (e *Error) Unwrap() error { return e.Cause }

// Is holds for an error of the same code, so that errors.Is(err, ErrImageInUse) works.
func (e *Error) Is(target error) bool {
	other, ok := target.(*Error)
	return ok && other.Code == e.Code
}

// Detail gives the value of a detail written key=value.
func (e *Error) Detail(key string) (string, bool) {
	for _, detail := range e.Details {
		if name, value, found := strings.Cut(detail, "="); found && name == key {
			return value, true
		}
	}
	return "", false
}

type entry struct {
	meaning, hint string
	retryable     bool
}

func failure(code Code, cause error, format string, words ...any) *Error {
	row := table[code]
	return &Error{Code: code, Message: fmt.Sprintf(format, words...), Hint: row.hint, Retryable: row.retryable, Cause: cause}
}

func protocolError(what any) *Error {
	return failure("internal", nil, "the service's answer cannot be understood: %v", what)
}

// apiError is an error as JSON has it.
type apiError struct {
	Code      Code     `json:"code"`
	Message   string   `json:"message"`
	Hint      string   `json:"hint"`
	Retryable bool     `json:"retryable"`
	Details   []string `json:"details"`
	Errno     int      `json:"errno"`
}

func (e apiError) typed() *Error {
	return &Error{Code: e.Code, Message: e.Message, Hint: e.Hint, Retryable: e.Retryable, Details: e.Details, Errno: syscall.Errno(e.Errno)}
}

func errorFromBody(status int, body []byte) *Error {
	var told apiError
	if json.Unmarshal(body, &told) != nil || told.Code == "" {
		return failure("internal", nil, "the service answered with status %d", status)
	}
	return told.typed()
}
