package msb

import (
	"context"
	"encoding/json"
	"errors"
	"iter"
	"strings"
	"sync"
	"syscall"
)

const (
	// stdinWindow is how many bytes of stdin may be sent before the service grants more.
	stdinWindow = 256 << 10
	// windowMax is the most credit that is ever kept, in bytes.
	windowMax = 64 << 20
	// pieceLen is the most stdin in one message, in bytes.
	pieceLen = 64 << 10
	// outputLenMax is the most output that Exec keeps unless the caller says otherwise, in bytes. A stream has no limit.
	outputLenMax = 64 << 20
)

// ExecEvent is something that happened to a running command: Started, Stdout, Stderr, OutputLost or Exited.
type ExecEvent interface{ execEvent() }

// Started says that the process exists.
type Started struct{ PID int }

// Stdout is standard output; with a terminal, all output.
type Stdout struct{ Data []byte }

// Stderr is standard error.
type Stderr struct{ Data []byte }

// OutputLost says that this watcher of a main workload was too slow for this many bytes.
type OutputLost struct{ Bytes uint64 }

// Exited says that it ended; nothing follows.
type Exited struct{ End ProcessEnd }

func (Started) execEvent()    {}
func (Stdout) execEvent()     {}
func (Stderr) execEvent()     {}
func (OutputLost) execEvent() {}
func (Exited) execEvent()     {}

// ExecOutput is what came out of a command.
type ExecOutput struct {
	ProcessEnd
	Stdout []byte
	Stderr []byte
}

// StdoutText is its standard output as text; bytes that are no UTF-8 are replaced.
func (o *ExecOutput) StdoutText() string { return strings.ToValidUTF8(string(o.Stdout), "\uFFFD") }

// StderrText is its standard error as text; bytes that are no UTF-8 are replaced.
func (o *ExecOutput) StderrText() string { return strings.ToValidUTF8(string(o.Stderr), "\uFFFD") }

// Check gives ErrExecTimeout or ErrCommandFailed if it did not end well.
func (o *ExecOutput) Check() error {
	switch {
	case o.TimedOut:
		return failure("exec_timeout", nil, "the command ran longer than its timeout and was killed")
	case o.Success():
		return nil
	case o.Signal != nil:
		return failure("command_failed", nil, "the command ended with signal %d", *o.Signal)
	case o.Code != nil:
		return failure("command_failed", nil, "the command ended with code %d", *o.Code)
	default:
		return failure("command_failed", nil, "the command ended")
	}
}

// ExecHandle is a running command. A caller that stops reading stops the command's output; nothing grows. One goroutine reads;
// others may write, signal and resize meanwhile. The context of the call that made it ends it.
type ExecHandle struct {
	socket *websocket
	ctx    context.Context
	unhook func() bool
	stdin  bool

	credit  sync.Mutex
	granted int
	more    chan struct{}
	over    chan struct{}
	ending  sync.Once
	done    bool
}

func beginSession(ctx context.Context, socket *websocket, first any, stdin bool) (*ExecHandle, error) {
	handle := &ExecHandle{
		socket: socket, ctx: ctx, stdin: stdin, granted: stdinWindow, more: make(chan struct{}, 1), over: make(chan struct{}),
	}
	handle.unhook = context.AfterFunc(ctx, func() { handle.Close() })
	if err := handle.tell(first); err != nil {
		handle.Close()
		return nil, err
	}
	return handle, nil
}

// Close ends the stream, and with it an exec that still runs; never a main workload.
func (h *ExecHandle) Close() {
	h.ending.Do(func() {
		close(h.over)
		h.socket.connection.Close()
	})
	if h.unhook != nil {
		h.unhook()
	}
}

func (h *ExecHandle) lost(err error) error {
	if h.ctx.Err() != nil {
		return lost(h.ctx, err)
	}
	return failure("exec_lost", err, "the connection to the running command was lost: %v", err)
}

func (h *ExecHandle) write(opcode byte, data []byte) error {
	if err := h.socket.send(opcode, data); err != nil {
		return h.lost(err)
	}
	return nil
}

func (h *ExecHandle) tell(message any) error {
	text, err := json.Marshal(message)
	if err != nil {
		return failure("invalid_request", err, "%v", err)
	}
	return h.write(opText, text)
}

// Next gives what happens next; nil after the end. After an error nothing follows.
func (h *ExecHandle) Next() (ExecEvent, error) {
	for !h.done {
		kind, data, err := h.socket.receive()
		if err != nil {
			h.end()
			if errors.Is(err, errMessageTooLong) {
				return nil, protocolError(err)
			}
			return nil, h.lost(err)
		}
		event, err := h.event(kind, data)
		if err != nil {
			h.end()
			return nil, err
		}
		if event != nil {
			return event, nil
		}
	}
	return nil, nil
}

func (h *ExecHandle) end() {
	h.done = true
	h.Close()
}

func (h *ExecHandle) event(kind byte, data []byte) (ExecEvent, error) {
	if kind == opBinary {
		switch {
		case len(data) > 0 && data[0] == 1:
			return Stdout{data[1:]}, nil
		case len(data) > 0 && data[0] == 2:
			return Stderr{data[1:]}, nil
		}
		return nil, protocolError("output of an unknown kind")
	}
	var message struct {
		Type  string     `json:"type"`
		PID   int        `json:"pid"`
		Bytes uint64     `json:"bytes"`
		End   ProcessEnd `json:"end"`
		Error apiError   `json:"error"`
	}
	if err := json.Unmarshal(data, &message); err != nil {
		return nil, protocolError(err)
	}
	switch message.Type {
	case "started":
		return Started{message.PID}, nil
	case "stdin_credit":
		h.credit.Lock()
		h.granted = int(min(uint64(h.granted)+min(message.Bytes, windowMax), windowMax))
		h.credit.Unlock()
		h.wake()
	case "output_lost":
		return OutputLost{message.Bytes}, nil
	case "exited":
		h.end()
		return Exited{message.End}, nil
	case "error":
		return nil, message.Error.typed()
	}
	// What a newer service says beyond this is not for us.
	return nil, nil
}

func (h *ExecHandle) wake() {
	select {
	case h.more <- struct{}{}:
	default:
	}
}

// Events are what happens until the end or the first error.
func (h *ExecHandle) Events() iter.Seq2[ExecEvent, error] {
	return func(yield func(ExecEvent, error) bool) {
		for {
			event, err := h.Next()
			if err != nil {
				yield(nil, err)
				return
			}
			if event == nil || !yield(event, nil) {
				return
			}
		}
	}
}

// Write writes to the command's stdin, waiting while it does not read; somebody must read events meanwhile.
func (h *ExecHandle) Write(data []byte) (int, error) {
	if !h.stdin {
		return 0, failure("invalid_config", nil, "the command was started without stdin")
	}
	written := 0
	for written < len(data) {
		now := h.take(min(len(data)-written, pieceLen))
		if now == 0 {
			return written, failure("exec_lost", h.ctx.Err(), "the command has ended")
		}
		if err := h.write(opBinary, data[written:written+now]); err != nil {
			return written, err
		}
		written += now
	}
	return written, nil
}

// take takes 1 to wanted bytes of credit, waiting until there is some; 0 once the stream is over.
func (h *ExecHandle) take(wanted int) int {
	for {
		h.credit.Lock()
		now := min(h.granted, wanted)
		h.granted -= now
		left := h.granted
		h.credit.Unlock()
		if left > 0 {
			h.wake()
		}
		if now > 0 {
			return now
		}
		select {
		case <-h.more:
		case <-h.over:
			return 0
		}
	}
}

// CloseStdin ends stdin: the command reads end of file.
func (h *ExecHandle) CloseStdin() error { return h.tell(map[string]any{"type": "stdin_eof"}) }

// Signal sends a signal to the command's process group.
func (h *ExecHandle) Signal(signal syscall.Signal) error {
	return h.tell(map[string]any{"type": "signal", "number": int(signal)})
}

// Kill sends SIGKILL.
func (h *ExecHandle) Kill() error { return h.Signal(syscall.SIGKILL) }

// Resize tells the command its terminal's size.
func (h *ExecHandle) Resize(rows, columns uint16) error {
	return h.tell(map[string]any{"type": "resize", "size": terminalSize{rows, columns}})
}

// Wait waits for its end; output is read and thrown away.
func (h *ExecHandle) Wait() (*ProcessEnd, error) {
	for event, err := range h.Events() {
		if err != nil {
			return nil, err
		}
		if exited, ok := event.(Exited); ok {
			return &exited.End, nil
		}
	}
	return nil, failure("exec_lost", nil, "the command has ended before")
}

// collect writes input, reads to the end and gives back everything.
func (h *ExecHandle) collect(input []byte, outputLenMax int) (*ExecOutput, error) {
	defer h.Close()
	if h.stdin {
		go func() {
			// A command may end without reading its stdin: that is its right, and its end is what counts.
			if _, err := h.Write(input); err == nil {
				_ = h.CloseStdin()
			}
		}()
	}
	var output ExecOutput
	for event, err := range h.Events() {
		if err != nil {
			return nil, err
		}
		switch event := event.(type) {
		case Stdout:
			output.Stdout = append(output.Stdout, event.Data...)
		case Stderr:
			output.Stderr = append(output.Stderr, event.Data...)
		case Exited:
			output.ProcessEnd = event.End
			return &output, nil
		}
		if len(output.Stdout)+len(output.Stderr) > outputLenMax {
			err := failure("limit_exceeded", nil, "the command wrote more than %d bytes", outputLenMax)
			err.Hint = "read it with ExecStream, or use WithExecOutputLenMax"
			return nil, err
		}
	}
	return nil, failure("exec_lost", nil, "the command has ended before")
}
