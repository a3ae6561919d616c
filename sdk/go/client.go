package msb

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"time"
)

const (
	// APIVersion is the version of the control API this package speaks.
	APIVersion = 1
	// answerLenMax is the largest answer that is read into memory, in bytes.
	answerLenMax = 64 << 20
	// lineLenMax is the longest line of a streamed answer, in bytes.
	lineLenMax = 8 << 20
	// versionTimeout is the time for a service that accepts a connection to say its version.
	versionTimeout = 10 * time.Second
	// anybody stands for no check of who listens.
	anybody = -1
)

// errDial marks that there was no connection at all.
var errDial = errors.New("no connection")

// Client is a connection to a service: one typed method for each route of the control API. It is safe for concurrent use. It never
// retries a request that may have been carried out.
type Client struct {
	socket  string
	owner   int
	version VersionInfo
	http    *http.Client
}

// Connect finds the service of this environment, or starts one as msb does.
func Connect(ctx context.Context) (*Client, error) { return ofProcess().findOrStart(ctx) }

// ConnectAt connects to the service on this socket. It starts nothing.
func ConnectAt(ctx context.Context, socket string) (*Client, error) {
	client, err := open(ctx, socket, anybody)
	if errors.Is(err, errDial) {
		return nil, cannotConnect(socket, err)
	}
	return client, err
}

func open(ctx context.Context, socket string, owner int) (*Client, error) {
	client := &Client{socket: socket, owner: owner}
	client.http = &http.Client{Transport: &http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return client.dial(ctx) },
		DisableCompression: true,
		MaxIdleConns:       4,
		IdleConnTimeout:    30 * time.Second,
	}}
	ctx, cancel := context.WithTimeout(ctx, versionTimeout)
	defer cancel()
	if err := client.call(ctx, http.MethodGet, "/v1/version", nil, &client.version); err != nil {
		client.Close()
		return nil, err
	}
	if client.version.APIVersion != APIVersion {
		client.Close()
		err := failure("unsupported_operation", nil, "msbd %s speaks version %d of the control API, this client speaks %d",
			client.version.Version, client.version.APIVersion, APIVersion)
		err.Hint = "restart msbd, so that it runs the installed version"
		err.Details = []string{
			"operation=connect", fmt.Sprintf("needs=%d", APIVersion), fmt.Sprintf("peer=%d", client.version.APIVersion),
		}
		return nil, err
	}
	return client, nil
}

// Close gives up idle connections. Sandboxes go on.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Version is what the service said it is.
func (c *Client) Version() VersionInfo { return c.version }

// Socket is the socket in use.
func (c *Client) Socket() string { return c.socket }

// dial connects. If an owner is set, the process that listens must belong to that user or to root: the default socket lives in a
// directory of a predictable name, where somebody else could be waiting for a request that holds secrets.
func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	var dialer net.Dialer
	connection, err := dialer.DialContext(ctx, "unix", c.socket)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errDial, err)
	}
	if c.owner == anybody {
		return connection, nil
	}
	uid, err := peer(connection.(*net.UnixConn))
	if err == nil && uid != c.owner && uid != 0 {
		err = fmt.Errorf("%s belongs to the user %d: %w", c.socket, uid, os.ErrPermission)
	}
	if err != nil {
		connection.Close()
		return nil, fmt.Errorf("%w: %w", errDial, err)
	}
	return connection, nil
}

func peer(connection *net.UnixConn) (uid int, err error) {
	raw, err := connection.SyscallConn()
	if err != nil {
		return 0, err
	}
	controlErr := raw.Control(func(fd uintptr) {
		var credentials *syscall.Ucred
		if credentials, err = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED); err == nil {
			uid = int(credentials.Uid)
		}
	})
	return uid, errors.Join(err, controlErr)
}

// lost is the error of a connection that failed under a request; the context's own end comes first.
func lost(ctx context.Context, err error) *Error {
	if ctx.Err() != nil {
		return failure("cancelled", ctx.Err(), "the call was cancelled: %v", ctx.Err())
	}
	return failure("daemon_unavailable", err, "the connection to msbd was lost: %v", err)
}

func (c *Client) send(ctx context.Context, method, target string, body io.Reader, contentType string) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, method, "http://msbd"+target, body)
	if err != nil {
		return nil, protocolError(err)
	}
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
	}
	response, err := c.http.Do(request)
	if err != nil {
		if errors.Is(err, errDial) && ctx.Err() == nil {
			return nil, cannotConnect(c.socket, err)
		}
		return nil, lost(ctx, err)
	}
	if response.StatusCode/100 == 2 {
		return response, nil
	}
	defer response.Body.Close()
	told, _ := io.ReadAll(io.LimitReader(response.Body, answerLenMax))
	return nil, errorFromBody(response.StatusCode, told)
}

func (c *Client) call(ctx context.Context, method, target string, body, into any) error {
	var sent io.Reader
	contentType := ""
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return failure("invalid_request", err, "%v", err)
		}
		sent, contentType = bytes.NewReader(text), "application/json"
	}
	response, err := c.send(ctx, method, target, sent, contentType)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, answerLenMax+1))
	if err != nil {
		return lost(ctx, err)
	}
	if len(text) > answerLenMax {
		return protocolError("it is too long")
	}
	if into == nil {
		return nil
	}
	if err := json.Unmarshal(text, into); err != nil {
		return protocolError(err)
	}
	return nil
}

// lines are the values of a streamed answer, one JSON document a line.
func lines[T any](ctx context.Context, c *Client, method, target string, body io.Reader, contentType string) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		response, err := c.send(ctx, method, target, body, contentType)
		if err != nil {
			yield(none, err)
			return
		}
		defer response.Body.Close()
		scanner := bufio.NewScanner(response.Body)
		scanner.Buffer(nil, lineLenMax)
		for scanner.Scan() {
			if len(bytes.TrimSpace(scanner.Bytes())) == 0 {
				continue
			}
			var value T
			if err := json.Unmarshal(scanner.Bytes(), &value); err != nil {
				yield(none, protocolError(err))
				return
			}
			if !yield(value, nil) {
				return
			}
		}
		if err := scanner.Err(); err != nil {
			yield(none, lost(ctx, err))
		}
	}
}

func sandboxPath(name, rest string) (string, error) {
	if err := checkName(name); err != nil {
		return "", err
	}
	return "/v1/sandboxes/" + name + rest, nil
}

func withQuery(path string, query url.Values) string {
	if len(query) == 0 {
		return path
	}
	return path + "?" + query.Encode()
}

func (c *Client) sandboxCall(ctx context.Context, method, name, rest string, body any) (*SandboxDetail, error) {
	path, err := sandboxPath(name, rest)
	if err != nil {
		return nil, err
	}
	var detail SandboxDetail
	if err := c.call(ctx, method, path, body, &detail); err != nil {
		return nil, err
	}
	return &detail, nil
}

// Host is what the host can do, as JSON of the service.
func (c *Client) Host(ctx context.Context) (json.RawMessage, error) {
	var host json.RawMessage
	err := c.call(ctx, http.MethodGet, "/v1/host", nil, &host)
	return host, err
}

// Shutdown ends the service; its sandboxes go on.
func (c *Client) Shutdown(ctx context.Context) error {
	return c.call(ctx, http.MethodPost, "/v1/shutdown", struct{}{}, nil)
}

// Create creates and boots a sandbox; an empty name lets the service choose one.
func (c *Client) Create(ctx context.Context, name string, options ...Option) (*Sandbox, error) {
	request, err := newCreateRequest(name, options)
	if err != nil {
		return nil, err
	}
	var detail SandboxDetail
	if err := c.call(ctx, http.MethodPost, "/v1/sandboxes", request, &detail); err != nil {
		return nil, err
	}
	return &Sandbox{client: c, detail: detail}, nil
}

// Get gives the sandbox of this name.
func (c *Client) Get(ctx context.Context, name string) (*Sandbox, error) {
	detail, err := c.sandboxCall(ctx, http.MethodGet, name, "", nil)
	if err != nil {
		return nil, err
	}
	return &Sandbox{client: c, detail: *detail}, nil
}

// List gives the sandboxes that the filter lets through, newest first; nil is no filter.
func (c *Client) List(ctx context.Context, filter *SandboxFilter) ([]SandboxSummary, error) {
	page, err := c.ListPage(ctx, filter)
	if err != nil {
		return nil, err
	}
	return page.Sandboxes, nil
}

// ListPage is List with where the next page begins, for filters with a Limit.
func (c *Client) ListPage(ctx context.Context, filter *SandboxFilter) (*SandboxPage, error) {
	var page SandboxPage
	if err := c.call(ctx, http.MethodGet, withQuery("/v1/sandboxes", filter.values()), nil, &page); err != nil {
		return nil, err
	}
	return &page, nil
}

// Ping asks a running sandbox's agent for a sign of life. It is no activity, and wakes nothing.
func (c *Client) Ping(ctx context.Context, name string) (*PingReport, error) {
	path, err := sandboxPath(name, "/ping")
	if err != nil {
		return nil, err
	}
	var report PingReport
	if err := c.call(ctx, http.MethodPost, path, struct{}{}, &report); err != nil {
		return nil, err
	}
	return &report, nil
}

// Start starts a resting sandbox.
func (c *Client) Start(ctx context.Context, name string) (*Sandbox, error) {
	detail, err := c.sandboxCall(ctx, http.MethodPost, name, "/start", struct{}{})
	if err != nil {
		return nil, err
	}
	return &Sandbox{client: c, detail: *detail}, nil
}

// Remove removes a sandbox; force kills it first.
func (c *Client) Remove(ctx context.Context, name string, force bool) error {
	path, err := sandboxPath(name, "")
	if err != nil {
		return err
	}
	return c.call(ctx, http.MethodDelete, withQuery(path, forced(force)), nil, nil)
}

func forced(force bool) url.Values {
	if force {
		return url.Values{"force": {"true"}}
	}
	return url.Values{}
}

// Events reads what happened. The iteration ends with the context, or at the first error.
func (c *Client) Events(ctx context.Context, query EventQuery) iter.Seq2[EventRecord, error] {
	return lines[EventRecord](ctx, c, http.MethodGet, withQuery("/v1/events", query.values()), nil, "")
}

// Metrics gives the newest sample of every sandbox, or of those that the query asks for.
func (c *Client) Metrics(ctx context.Context, query MetricsQuery) (*MetricsSnapshot, error) {
	var snapshot MetricsSnapshot
	if err := c.call(ctx, http.MethodGet, withQuery("/v1/metrics", query.values()), nil, &snapshot); err != nil {
		return nil, err
	}
	return &snapshot, nil
}

// MetricsStream is Metrics at each interval (100 ms to an hour), the first at once. A reader that is slow misses some.
func (c *Client) MetricsStream(ctx context.Context, query MetricsQuery, interval time.Duration) iter.Seq2[MetricsSnapshot, error] {
	values := query.values()
	values.Set("interval_ms", fmt.Sprint(interval.Milliseconds()))
	return lines[MetricsSnapshot](ctx, c, http.MethodGet, withQuery("/v1/metrics/stream", values), nil, "")
}

// MetricsHistory gives the last hour of one sandbox, or its last part if last is not 0, in at most pointsMax points if that is not 0.
func (c *Client) MetricsHistory(ctx context.Context, name string, last time.Duration, pointsMax int) (*MetricsHistory, error) {
	path, err := sandboxPath(name, "/metrics")
	if err != nil {
		return nil, err
	}
	values := url.Values{}
	if last > 0 {
		values.Set("last_ms", fmt.Sprint(last.Milliseconds()))
	}
	if pointsMax > 0 {
		values.Set("points_max", fmt.Sprint(pointsMax))
	}
	var history MetricsHistory
	if err := c.call(ctx, http.MethodGet, withQuery(path, values), nil, &history); err != nil {
		return nil, err
	}
	return &history, nil
}

// MetricsQuery says which samples.
type MetricsQuery struct {
	// Names are those of the only sandboxes, if there are any.
	Names []string
	// Labels are terms that all must fit: KEY=VALUE or KEY.
	Labels []string
}

func (q MetricsQuery) values() url.Values {
	values := url.Values{}
	if len(q.Names) > 0 {
		values["name"] = q.Names
	}
	if len(q.Labels) > 0 {
		values["label"] = q.Labels
	}
	return values
}

func (c *Client) session(ctx context.Context, target string, first any, stdin bool) (*ExecHandle, error) {
	connection, err := c.dial(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil, lost(ctx, err)
		}
		return nil, cannotConnect(c.socket, err)
	}
	socket, err := upgrade(ctx, connection, target)
	if err != nil {
		connection.Close()
		return nil, err
	}
	return beginSession(ctx, socket, first, stdin)
}

// EventQuery says which events.
type EventQuery struct {
	// Follow goes on with new events.
	Follow bool
	// Since leaves out events up to this sequence number.
	Since uint64
}

func (q EventQuery) values() url.Values {
	values := url.Values{}
	if q.Follow {
		values.Set("follow", "true")
	}
	if q.Since > 0 {
		values.Set("since", fmt.Sprint(q.Since))
	}
	return values
}

// LogQuery says which lines of a log.
type LogQuery struct {
	// Follow goes on with new lines until the sandbox rests.
	Follow bool
	// Tail is the number of last lines, 0 for all.
	Tail uint64
	// Since and Until bound the time, where they are set.
	Since, Until time.Time
	// Source is stdout, stderr, output, system or all; output if empty.
	Source string
	// Grep leaves out lines that do not contain it, if it is not empty.
	Grep string
}

func (q LogQuery) values() url.Values {
	values := EventQuery{Follow: q.Follow}.values()
	if q.Tail > 0 {
		values.Set("tail", fmt.Sprint(q.Tail))
	}
	if !q.Since.IsZero() {
		values.Set("since", q.Since.Format(time.RFC3339Nano))
	}
	if !q.Until.IsZero() {
		values.Set("until", q.Until.Format(time.RFC3339Nano))
	}
	if q.Source != "" {
		values.Set("source", q.Source)
	}
	if q.Grep != "" {
		values.Set("grep", q.Grep)
	}
	return values
}
