package msb

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	startTimeout     = 20 * time.Second
	socketPathLenMax = 107
	logLenMax        = 16 << 20
	logTailLines     = 20
	installHint      = "install msb (`cargo xtask install --prefix ~/.local` in its repository), or set MSB_PATH to where it is"
)

// keptVariables are what a daemon keeps of our environment beside MSB_*: it lives for months, so secrets stay out of it.
var keptVariables = strings.Fields("HOME PATH USER LOGNAME LANG LC_ALL LC_CTYPE TZ TMPDIR XDG_RUNTIME_DIR RUST_BACKTRACE " +
	"HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy SSL_CERT_FILE SSL_CERT_DIR")

// surroundings are what decides about paths.
type surroundings struct {
	variable func(string) string
	uid      int
}

func ofProcess() surroundings { return surroundings{os.Getenv, os.Getuid()} }

func (s surroundings) home() string {
	if own := s.variable("MSB_HOME"); own != "" {
		return own
	}
	if home := s.variable("HOME"); home != "" {
		return filepath.Join(home, ".msb")
	}
	return fmt.Sprintf("/tmp/msb-home-%d", s.uid)
}

func (s surroundings) socket() string {
	if named := s.variable("MSB_HOST"); named != "" {
		return named
	}
	base := fmt.Sprintf("/tmp/msb-%d", s.uid)
	if xdg := s.variable("XDG_RUNTIME_DIR"); xdg != "" {
		base = filepath.Join(xdg, "msb")
	}
	own, home := s.variable("MSB_HOME"), s.variable("HOME")
	// A home that is not the default one has a directory of its own, so that two services never share a socket.
	if own != "" && (home == "" || filepath.Clean(own) != filepath.Join(home, ".msb")) {
		hash := fnv.New64a()
		_, _ = io.WriteString(hash, own)
		base = filepath.Join(base, fmt.Sprintf("h%016x", hash.Sum64()))
	}
	return filepath.Join(base, "msbd.sock")
}

// daemonProgram is the program to start: MSB_DAEMON, else msbd in MSB_PATH or in PATH.
func (s surroundings) daemonProgram() (string, error) {
	missing := func(format string, words ...any) (string, error) {
		err := failure("runtime_not_found", nil, format, words...)
		err.Hint = installHint
		return "", err
	}
	if named := s.variable("MSB_DAEMON"); named != "" {
		if !isFile(named) {
			return missing("MSB_DAEMON names %s, which is no file", named)
		}
		return filepath.Abs(named)
	}
	if path := s.variable("MSB_PATH"); path != "" {
		folder := path
		if info, err := os.Stat(path); err != nil || !info.IsDir() {
			folder = filepath.Dir(path)
		}
		program := filepath.Join(folder, "msbd")
		if !isFile(program) {
			return missing("MSB_PATH names %s, where there is no msbd", path)
		}
		return filepath.Abs(program)
	}
	for _, folder := range filepath.SplitList(s.variable("PATH")) {
		if program := filepath.Join(folder, "msbd"); isFile(program) {
			return filepath.Abs(program)
		}
	}
	return missing("the program msbd is not in PATH")
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

func cannotConnect(path string, err error) *Error {
	code := Code("daemon_unavailable")
	if errors.Is(err, os.ErrPermission) {
		code = "permission_denied"
	}
	return failure(code, err, "cannot connect to %s: %v", path, err)
}

// find gives the service that answers now; nil if none does. It starts nothing.
func (s surroundings) find(ctx context.Context) (*Client, error) {
	path := s.socket()
	if len(path) > socketPathLenMax {
		return nil, failure("daemon_unavailable", nil, "the path of the socket is too long: %s (max %d bytes)", path, socketPathLenMax)
	}
	named := s.variable("MSB_HOST") != ""
	owner := s.uid
	if named {
		owner = anybody
	}
	client, err := open(ctx, path, owner)
	if err == nil {
		return client, nil
	}
	var typed *Error
	if errors.As(err, &typed) && !errors.Is(err, errDial) {
		return nil, err
	}
	told := cannotConnect(path, err)
	if named {
		told.Hint = "MSB_HOST names this socket: start the service behind it, or unset MSB_HOST"
		return nil, told
	}
	for _, absent := range []error{syscall.ENOENT, syscall.ECONNREFUSED, syscall.ENOTDIR} {
		if errors.Is(err, absent) {
			return nil, nil
		}
	}
	return nil, told
}

// findOrStart gives the service that answers, started if there is none.
func (s surroundings) findOrStart(ctx context.Context) (*Client, error) {
	if client, err := s.find(ctx); client != nil || err != nil {
		return client, err
	}
	program, err := s.daemonProgram()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := os.MkdirAll(s.home(), 0o700); err != nil {
		return nil, failure("home_unusable", err, "%v", err)
	}
	lock, err := os.OpenFile(filepath.Join(s.home(), "start.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, failure("home_unusable", err, "%v", err)
	}
	defer lock.Close()
	// Whoever holds the lock is starting a daemon.
	for syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		if !pause(ctx, 20*time.Millisecond) {
			return nil, failure("daemon_unavailable", ctx.Err(), "another client has been starting msbd for too long")
		}
		if client, err := s.find(ctx); client != nil || err != nil {
			return client, err
		}
	}
	if client, err := s.find(ctx); client != nil || err != nil {
		return client, err
	}
	return s.start(ctx, program)
}

func (s surroundings) start(ctx context.Context, program string) (*Client, error) {
	path := filepath.Join(s.home(), "msbd.log")
	if info, err := os.Stat(path); err == nil && info.Size() >= logLenMax {
		_ = os.Rename(path, path+".1")
	}
	log, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, failure("home_unusable", err, "%v", err)
	}
	defer log.Close()
	var began int64
	if info, err := log.Stat(); err == nil {
		began = info.Size()
	}
	command := exec.Command(program)
	command.Env = s.keptEnvironment(os.Environ())
	command.Stdout, command.Stderr = log, log
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := command.Start(); err != nil {
		return nil, failure("daemon_unavailable", err, "cannot start %s: %v", program, err)
	}
	ended := make(chan error, 1)
	// Waits for as long as the daemon lives, so that no zombie of ours is left.
	go func() { ended <- command.Wait() }()
	for {
		inTime := pause(ctx, 5*time.Millisecond)
		var how string
		// The look at the process comes first: one that ended because another serves this home leaves that one answering.
		select {
		case err := <-ended:
			how = fmt.Sprintf("msbd ended while it was starting (%v)", err)
		default:
			if !inTime {
				how = "msbd did not answer in time"
			}
		}
		client, err := s.find(ctx)
		if client != nil {
			return client, nil
		}
		if how == "" {
			continue
		}
		if err != nil && inTime {
			return nil, err
		}
		told := failure("daemon_unavailable", ctx.Err(), "%s", how)
		told.Hint = fmt.Sprintf("see the end of %s, or run `msbd` in a terminal", path)
		told.Details = tail(path, began)
		return nil, told
	}
}

func (s surroundings) keptEnvironment(all []string) []string {
	var kept []string
	for _, pair := range all {
		name, _, _ := strings.Cut(pair, "=")
		keep := strings.HasPrefix(name, "MSB_") && name != "MSB_HOST"
		for _, known := range keptVariables {
			keep = keep || name == known
		}
		if keep {
			kept = append(kept, pair)
		}
	}
	return kept
}

func tail(path string, from int64) []string {
	file, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer file.Close()
	if _, err := file.Seek(from, io.SeekStart); err != nil {
		return nil
	}
	text, _ := io.ReadAll(io.LimitReader(file, logLenMax))
	lines := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	return lines[max(0, len(lines)-logTailLines):]
}

// pause waits; false once the context is over.
func pause(ctx context.Context, duration time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(duration):
		return true
	}
}
