package msb

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"iter"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

// readLenMax is the most that ReadFile keeps, in bytes. A stream has no limit.
const readLenMax = 64 << 20

// Fs are the files of one sandbox, in the name of one of its users. Relative paths begin at /. An error of the sandbox's system carries its
// Errno.
type Fs struct {
	client  *Client
	sandbox string
	user    string
}

// Fs gives its files.
func (s *Sandbox) Fs() *Fs { return &Fs{client: s.client, sandbox: s.Name()} }

// AsUser acts as another user: USER|UID[:GROUP|GID].
func (f *Fs) AsUser(user string) *Fs { return &Fs{f.client, f.sandbox, user} }

type fileCall struct {
	Operation string      `json:"operation"`
	Path      string      `json:"path,omitempty"`
	From      string      `json:"from,omitempty"`
	To        string      `json:"to,omitempty"`
	Target    string      `json:"target,omitempty"`
	NoFollow  *bool       `json:"no_follow,omitempty"`
	Parents   *bool       `json:"parents,omitempty"`
	Recursive *bool       `json:"recursive,omitempty"`
	Mode      *uint32     `json:"mode,omitempty"`
	Change    *FileChange `json:"change,omitempty"`
}

type fileAnswer struct {
	Attributes FileAttributes   `json:"attributes"`
	Entries    []DirectoryEntry `json:"entries"`
	Path       string           `json:"path"`
}

func (f *Fs) call(ctx context.Context, call fileCall) (*fileAnswer, error) {
	path, err := sandboxPath(f.sandbox, "/files")
	if err != nil {
		return nil, err
	}
	request := struct {
		User string   `json:"user,omitempty"`
		Call fileCall `json:"call"`
	}{f.user, call}
	var answer fileAnswer
	if err := f.client.call(ctx, http.MethodPost, path, request, &answer); err != nil {
		return nil, err
	}
	return &answer, nil
}

func (f *Fs) do(ctx context.Context, call fileCall) error {
	_, err := f.call(ctx, call)
	return err
}

func (f *Fs) content(path string) (string, url.Values, error) {
	target, err := sandboxPath(f.sandbox, "/files/content")
	query := url.Values{"path": {path}}
	if f.user != "" {
		query.Set("user", f.user)
	}
	return target, query, err
}

// ReadFile reads a whole file of at most 64 MiB; longer ones fail with ErrLimitExceeded and are read with Open.
func (f *Fs) ReadFile(ctx context.Context, path string) ([]byte, error) {
	file, err := f.Open(ctx, path, 0, -1)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, readLenMax+1))
	if err != nil {
		return nil, lost(ctx, err)
	}
	if len(content) > readLenMax {
		err := failure("limit_exceeded", nil, "'%s' has more than %d bytes", path, readLenMax)
		err.Hint = "read it as a stream, with Open"
		return nil, err
	}
	return content, nil
}

// Open reads a file as a stream from an offset, at most length bytes, or to its end if length is negative. Close it.
func (f *Fs) Open(ctx context.Context, path string, offset, length int64) (io.ReadCloser, error) {
	target, query, err := f.content(path)
	if err != nil {
		return nil, err
	}
	query.Set("offset", strconv.FormatInt(offset, 10))
	if length >= 0 {
		query.Set("len", strconv.FormatInt(length, 10))
	}
	response, err := f.client.send(ctx, http.MethodGet, withQuery(target, query), nil, "")
	if err != nil {
		return nil, err
	}
	return response.Body, nil
}

// WriteFile writes a whole file: it appears under its name only when all of it is there. One that was there keeps mode and owner.
func (f *Fs) WriteFile(ctx context.Context, path string, content []byte) (*FileAttributes, error) {
	return f.Write(ctx, path, bytes.NewReader(content), nil)
}

// Write is WriteFile from a stream, with permission bits unless mode is nil. An error of the stream ends it, and nothing is left behind.
func (f *Fs) Write(ctx context.Context, path string, content io.Reader, mode *uint32) (*FileAttributes, error) {
	return f.put(ctx, path, content, mode, false)
}

// Append adds to the end of a file, which is made if it does not exist.
func (f *Fs) Append(ctx context.Context, path string, content []byte) (*FileAttributes, error) {
	return f.put(ctx, path, bytes.NewReader(content), nil, true)
}

func (f *Fs) put(ctx context.Context, path string, content io.Reader, mode *uint32, end bool) (*FileAttributes, error) {
	target, query, err := f.content(path)
	if err != nil {
		return nil, err
	}
	if mode != nil {
		query.Set("mode", strconv.FormatUint(uint64(*mode), 10))
	}
	if end {
		query.Set("append", "true")
	}
	// The reader is hidden behind its interface, so that nothing but us closes it.
	body := struct{ io.Reader }{content}
	response, err := f.client.send(ctx, http.MethodPut, withQuery(target, query), body, "application/octet-stream")
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	var answer fileAnswer
	if err := json.NewDecoder(io.LimitReader(response.Body, answerLenMax)).Decode(&answer); err != nil {
		return nil, protocolError(err)
	}
	return &answer.Attributes, nil
}

// Stat gives the attributes of a path; a symbolic link is followed.
func (f *Fs) Stat(ctx context.Context, path string) (*FileAttributes, error) {
	answer, err := f.call(ctx, fileCall{Operation: "stat", Path: path})
	if err != nil {
		return nil, err
	}
	return &answer.Attributes, nil
}

// Lstat gives the attributes of a path; a symbolic link is meant itself.
func (f *Fs) Lstat(ctx context.Context, path string) (*FileAttributes, error) {
	answer, err := f.call(ctx, fileCall{Operation: "stat", Path: path, NoFollow: yes()})
	if err != nil {
		return nil, err
	}
	return &answer.Attributes, nil
}

func yes() *bool { value := true; return &value }

// Exists says whether there is anything at a path.
func (f *Fs) Exists(ctx context.Context, path string) (bool, error) {
	_, err := f.Lstat(ctx, path)
	var typed *Error
	if errors.As(err, &typed) && typed.Code == "path_not_found" && typed.Errno != 0 {
		return false, nil
	}
	return err == nil, err
}

// ReadDir gives the entries of a directory, sorted by name.
func (f *Fs) ReadDir(ctx context.Context, path string) ([]DirectoryEntry, error) {
	answer, err := f.call(ctx, fileCall{Operation: "list", Path: path})
	if err != nil {
		return nil, err
	}
	return answer.Entries, nil
}

// Mkdir makes a directory.
func (f *Fs) Mkdir(ctx context.Context, path string) error {
	return f.do(ctx, fileCall{Operation: "make_directory", Path: path})
}

// MkdirAll makes a directory with its missing parents; one that exists is fine.
func (f *Fs) MkdirAll(ctx context.Context, path string) error {
	return f.do(ctx, fileCall{Operation: "make_directory", Path: path, Parents: yes()})
}

// Remove removes a file or an empty directory.
func (f *Fs) Remove(ctx context.Context, path string) error {
	return f.do(ctx, fileCall{Operation: "remove", Path: path})
}

// RemoveAll removes whatever it is, with everything below it; links are not followed.
func (f *Fs) RemoveAll(ctx context.Context, path string) error {
	return f.do(ctx, fileCall{Operation: "remove", Path: path, Recursive: yes()})
}

// Rename renames; a file that has the new name is replaced.
func (f *Fs) Rename(ctx context.Context, from, to string) error {
	return f.do(ctx, fileCall{Operation: "rename", From: from, To: to})
}

// Symlink makes a symbolic link at path that leads to target.
func (f *Fs) Symlink(ctx context.Context, target, path string) error {
	return f.do(ctx, fileCall{Operation: "symlink", Target: target, Path: path})
}

// Link gives a file another name.
func (f *Fs) Link(ctx context.Context, target, path string) error {
	return f.do(ctx, fileCall{Operation: "hard_link", Target: target, Path: path})
}

// Readlink tells what a symbolic link leads to.
func (f *Fs) Readlink(ctx context.Context, path string) (string, error) {
	answer, err := f.call(ctx, fileCall{Operation: "read_link", Path: path})
	if err != nil {
		return "", err
	}
	return answer.Path, nil
}

// RealPath gives the path without links, dots and doubled slashes.
func (f *Fs) RealPath(ctx context.Context, path string) (string, error) {
	answer, err := f.call(ctx, fileCall{Operation: "real_path", Path: path})
	if err != nil {
		return "", err
	}
	return answer.Path, nil
}

// Change changes mode, owner, size or times.
func (f *Fs) Change(ctx context.Context, path string, change FileChange) error {
	return f.do(ctx, fileCall{Operation: "change", Path: path, Change: &change})
}

// Chmod changes permission bits.
func (f *Fs) Chmod(ctx context.Context, path string, mode uint32) error {
	return f.Change(ctx, path, FileChange{Mode: &mode})
}

// Watch watches a directory's entries or a file. The first record, of kind watching, says that the watch is in place.
func (f *Fs) Watch(ctx context.Context, path string, recursive bool) iter.Seq2[FileChanged, error] {
	query := url.Values{"path": {path}, "recursive": {strconv.FormatBool(recursive)}}
	if f.user != "" {
		query.Set("user", f.user)
	}
	return lines[FileChanged](ctx, f.client, http.MethodGet, withQuery("/v1/sandboxes/"+f.sandbox+"/files/watch", query), nil, "")
}

// CopyFromHost copies one file of this machine into the sandbox, with its permission bits; whole trees are Sandbox.CopyInto's.
func (f *Fs) CopyFromHost(ctx context.Context, source, target string) (*FileAttributes, error) {
	file, err := os.Open(source)
	if err != nil {
		return nil, localError(err)
	}
	defer file.Close()
	found, err := file.Stat()
	if err != nil {
		return nil, localError(err)
	}
	mode := uint32(found.Mode().Perm())
	return f.Write(ctx, target, file, &mode)
}

// CopyToHost copies one file of the sandbox to this machine. It is there whole or not at all.
func (f *Fs) CopyToHost(ctx context.Context, source, target string) error {
	content, err := f.Open(ctx, source, 0, -1)
	if err != nil {
		return err
	}
	defer content.Close()
	return writeWhole(ctx, content, target)
}

// localError is the error of this machine's file system.
func localError(err error) error {
	var typed *Error
	switch {
	case errors.As(err, &typed):
		return err
	case errors.Is(err, fs.ErrNotExist):
		return failure("path_not_found", err, "%v", err)
	case errors.Is(err, fs.ErrPermission):
		return failure("permission_denied", err, "%v", err)
	case errors.Is(err, fs.ErrExist):
		return failure("path_exists", err, "%v", err)
	case errors.Is(err, syscall.ENOSPC):
		return failure("disk_full", err, "%v", err)
	}
	return failure("file_failed", err, "%v", err)
}

// writeWhole writes a file of this machine that is there whole or not at all.
func writeWhole(ctx context.Context, content io.Reader, path string) (err error) {
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return localError(err)
	}
	defer func() {
		if err != nil {
			file.Close()
			os.Remove(file.Name())
		}
	}()
	if _, err := io.Copy(file, content); err != nil {
		var broken *fs.PathError
		if errors.As(err, &broken) {
			return localError(err)
		}
		return lost(ctx, err)
	}
	if err := errors.Join(file.Chmod(0o644), file.Close()); err != nil {
		return localError(err)
	}
	if err := os.Rename(file.Name(), path); err != nil {
		return localError(err)
	}
	return nil
}
