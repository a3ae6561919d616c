package msb

import (
	"context"
	"errors"
	"iter"
	"net/http"
	"time"
)

// Sandbox is a sandbox of a service. Forgetting the value does nothing to the sandbox; one made without WithDetached ends with this
// process.
type Sandbox struct {
	client *Client
	detail SandboxDetail
}

// CreateSandbox creates and boots a sandbox on the service of this environment; an empty name lets the service choose one.
func CreateSandbox(ctx context.Context, name string, options ...Option) (*Sandbox, error) {
	// Refused before any connection is made.
	if _, err := newCreateRequest(name, options); err != nil {
		return nil, err
	}
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	return client.Create(ctx, name, options...)
}

// GetSandbox gives the sandbox of this name.
func GetSandbox(ctx context.Context, name string) (*Sandbox, error) {
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	return client.Get(ctx, name)
}

// StartSandbox starts a resting sandbox.
func StartSandbox(ctx context.Context, name string) (*Sandbox, error) {
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	return client.Start(ctx, name)
}

// ListSandboxes gives every sandbox, newest first.
func ListSandboxes(ctx context.Context) ([]SandboxSummary, error) {
	return ListSandboxesWith(ctx, nil)
}

// ListSandboxesWith gives the sandboxes that the filter lets through.
func ListSandboxesWith(ctx context.Context, filter *SandboxFilter) ([]SandboxSummary, error) {
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.List(ctx, filter)
}

// RemoveSandbox removes a resting sandbox.
func RemoveSandbox(ctx context.Context, name string) error {
	client, err := Connect(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	return client.Remove(ctx, name, false)
}

// Name is its name.
func (s *Sandbox) Name() string { return s.detail.Name }

// Status is its state at the last call that answered with it.
func (s *Sandbox) Status() string { return s.detail.Status }

// Detail is what was known at that call.
func (s *Sandbox) Detail() SandboxDetail { return s.detail }

// Client is the service it lives on.
func (s *Sandbox) Client() *Client { return s.client }

func (s *Sandbox) update(ctx context.Context, method, rest string, body any) error {
	detail, err := s.client.sandboxCall(ctx, method, s.Name(), rest, body)
	if err != nil {
		return err
	}
	s.detail = *detail
	return nil
}

// Refresh asks anew.
func (s *Sandbox) Refresh(ctx context.Context) error { return s.update(ctx, http.MethodGet, "", nil) }

// Exec runs a command to its end and keeps its output. A command that fails is no error: see ExecOutput.Check.
func (s *Sandbox) Exec(ctx context.Context, command []string, options ...ExecOption) (*ExecOutput, error) {
	request, err := newExecRequest(command, options)
	if err != nil {
		return nil, err
	}
	handle, err := s.exec(ctx, request)
	if err != nil {
		return nil, err
	}
	return handle.collect(request.input, request.outputLenMax)
}

// Shell runs a line of the sandbox's own shell.
func (s *Sandbox) Shell(ctx context.Context, script string, options ...ExecOption) (*ExecOutput, error) {
	return s.Exec(ctx, []string{"/bin/sh", "-c", script}, options...)
}

// ExecStream runs a command as a stream of events; close the handle.
func (s *Sandbox) ExecStream(ctx context.Context, command []string, options ...ExecOption) (*ExecHandle, error) {
	request, err := newExecRequest(command, options)
	if err != nil {
		return nil, err
	}
	return s.exec(ctx, request)
}

func (s *Sandbox) exec(ctx context.Context, request *execRequest) (*ExecHandle, error) {
	path, err := sandboxPath(s.Name(), "/exec")
	if err != nil {
		return nil, err
	}
	return s.client.session(ctx, path, map[string]any{"type": "exec", "exec": request}, request.Stdin)
}

// Attach watches the main workload.
func (s *Sandbox) Attach(ctx context.Context, stdin bool) (*ExecHandle, error) {
	path, err := sandboxPath(s.Name(), "/attach")
	if err != nil {
		return nil, err
	}
	return s.client.session(ctx, path, map[string]any{"type": "attach", "stdin": stdin, "terminal": nil, "timeout_ms": nil}, stdin)
}

// Logs reads its log; with Follow until it rests. The iteration ends with the context, or at the first error.
func (s *Sandbox) Logs(ctx context.Context, query LogQuery) iter.Seq2[LogRecord, error] {
	return lines[LogRecord](ctx, s.client, http.MethodGet, withQuery("/v1/sandboxes/"+s.Name()+"/logs", query.values()), nil, "")
}

// Events reads what happened to it.
func (s *Sandbox) Events(ctx context.Context, query EventQuery) iter.Seq2[EventRecord, error] {
	return func(yield func(EventRecord, error) bool) {
		for event, err := range s.client.Events(ctx, query) {
			if (err != nil || event.SandboxID == s.detail.ID) && !yield(event, err) {
				return
			}
		}
	}
}

// Metrics gives its newest sample; nil when it has none because it rests.
func (s *Sandbox) Metrics(ctx context.Context) (*SandboxMetrics, error) {
	snapshot, err := s.client.Metrics(ctx, MetricsQuery{Names: []string{s.Name()}})
	if err != nil {
		return nil, err
	}
	for _, sample := range snapshot.Sandboxes {
		if sample.ID == s.detail.ID {
			return &sample, nil
		}
	}
	return nil, nil
}

// MetricsStream gives its samples from now on, one at each interval (100 ms to an hour), the first at once.
func (s *Sandbox) MetricsStream(ctx context.Context, interval time.Duration) iter.Seq2[SandboxMetrics, error] {
	return func(yield func(SandboxMetrics, error) bool) {
		for snapshot, err := range s.client.MetricsStream(ctx, MetricsQuery{Names: []string{s.Name()}}, interval) {
			if err != nil {
				yield(SandboxMetrics{}, err)
				return
			}
			for _, sample := range snapshot.Sandboxes {
				if sample.ID == s.detail.ID && !yield(sample, nil) {
					return
				}
			}
		}
	}
}

// MetricsHistory gives its last hour, or its last part if last is not 0, in at most pointsMax points if that is not 0.
func (s *Sandbox) MetricsHistory(ctx context.Context, last time.Duration, pointsMax int) (*MetricsHistory, error) {
	return s.client.MetricsHistory(ctx, s.Name(), last, pointsMax)
}

// Ping asks its agent for a sign of life. It is no activity, and wakes nothing.
func (s *Sandbox) Ping(ctx context.Context) (*PingReport, error) { return s.client.Ping(ctx, s.Name()) }

// Touch counts as activity.
func (s *Sandbox) Touch(ctx context.Context) error {
	return s.update(ctx, http.MethodPost, "/touch", struct{}{})
}

// Detach lets it outlive this process.
func (s *Sandbox) Detach(ctx context.Context) error {
	return s.update(ctx, http.MethodPost, "/detach", struct{}{})
}

type stopRequest struct {
	GraceMS *int64 `json:"grace_ms,omitempty"`
	Force   bool   `json:"force"`
}

// Stop stops it: stop signal, its own grace time, flush.
func (s *Sandbox) Stop(ctx context.Context) error {
	return s.update(ctx, http.MethodPost, "/stop", stopRequest{})
}

// StopWithTimeout is Stop with another grace time.
func (s *Sandbox) StopWithTimeout(ctx context.Context, grace time.Duration) error {
	if grace < 0 {
		return failure("invalid_config", nil, "grace must not be negative")
	}
	return s.update(ctx, http.MethodPost, "/stop", stopRequest{GraceMS: milliseconds(grace)})
}

// Kill ends it at once, without a flush.
func (s *Sandbox) Kill(ctx context.Context) error {
	return s.update(ctx, http.MethodPost, "/stop", stopRequest{Force: true})
}

// Restart stops it if it runs, and starts it.
func (s *Sandbox) Restart(ctx context.Context) error {
	return s.update(ctx, http.MethodPost, "/restart", stopRequest{})
}

// WaitUntilStopped waits until it rests.
func (s *Sandbox) WaitUntilStopped(ctx context.Context) (*SandboxDetail, error) {
	if err := s.update(ctx, http.MethodGet, "/wait", nil); err != nil {
		return nil, err
	}
	return &s.detail, nil
}

// Remove removes it; force kills it first.
func (s *Sandbox) Remove(ctx context.Context, force bool) error {
	return s.client.Remove(ctx, s.Name(), force)
}

// Close stops and removes it, for a defer: it has a time of its own, since the caller's context may be over by then.
func (s *Sandbox) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := s.Remove(ctx, true)
	if errors.Is(err, ErrSandboxNotFound) {
		return nil
	}
	return err
}
