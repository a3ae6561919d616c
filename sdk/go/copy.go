package msb

import (
	"archive/tar"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

const (
	// copyUser is who copies if nobody is named: what is copied into a sandbox is its root's, as with docker.
	copyUser = "0:0"
	// linksMax is how many links are followed to a destination (as in Linux).
	linksMax = 40
	// memberLenMax is the longest path in a stream, in bytes.
	memberLenMax = 4096
	// warningsLenMax is how much of a sandbox's warnings is kept, in bytes.
	warningsLenMax = 64 << 10
)

// CopyReport is what a copy did.
type CopyReport struct {
	// Bytes of the stream: contents and headers.
	Bytes uint64
	// Warnings tell what was left out, a line each.
	Warnings []string
}

// CopyInto copies a file or directory of this machine into it, by the rules of docker cp. It appears whole or not at all where its name is
// free; a directory that is there is filled file by file.
func (s *Sandbox) CopyInto(ctx context.Context, source, target string) (*CopyReport, error) {
	found, err := os.Lstat(source)
	if err != nil {
		return nil, localError(err)
	}
	files := s.Fs().AsUser(copyUser)
	target, kind, err := files.destination(ctx, target)
	if err != nil {
		return nil, err
	}
	directory, name, err := place(source, found.IsDir(), target, kind)
	if err != nil {
		return nil, err
	}
	action := map[string]any{"kind": "unpack", "directory": directory}
	if name != "" {
		action["name"] = name
	}
	handle, err := s.archive(ctx, action, true)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	report := &CopyReport{}
	sent := make(chan error, 1)
	var leftOut []string
	go func() {
		err := pack(counted{handle, &report.Bytes}, source, orDot(name), &leftOut)
		if err == nil {
			err = handle.CloseStdin()
		}
		if err != nil && !errors.Is(err, ErrExecLost) {
			// It ends the session, and with it what was unfinished.
			handle.Close()
		}
		sent <- err
	}()
	heard := hear(handle, report)
	handle.Close()
	// A stream that broke has nothing to say about why: the other side has.
	if err := <-sent; err != nil && !errors.Is(err, ErrExecLost) && !errors.Is(err, ErrCancelled) {
		return nil, localError(err)
	}
	if heard != nil {
		return nil, heard
	}
	report.Warnings = append(leftOut, report.Warnings...)
	return report, nil
}

// CopyOut copies a file or directory of it to this machine, by the rules of docker cp. What the sandbox sends is never trusted: it can make
// nothing but the one name that was asked for.
func (s *Sandbox) CopyOut(ctx context.Context, source, target string) (*CopyReport, error) {
	attributes, err := s.Fs().AsUser(copyUser).Lstat(ctx, source)
	if err != nil {
		return nil, err
	}
	kind := nothing
	if real, err := filepath.EvalSymlinks(target); err == nil {
		target, kind = real, file
		if found, err := os.Stat(real); err == nil && found.IsDir() {
			kind = directory
		}
	}
	folder, name, err := place(source, attributes.IsDir(), target, kind)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(folder)
	if err != nil {
		return nil, localError(err)
	}
	defer root.Close()
	handle, err := s.archive(ctx, map[string]any{"kind": "pack", "path": source, "name": orDot(name)}, false)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	report := &CopyReport{}
	reader := &archiveReader{handle: handle, report: report}
	if err := unpack(root, reader, name); err != nil {
		return nil, localError(err)
	}
	return report, nil
}

func orDot(name string) string {
	if name == "" {
		return "."
	}
	return name
}

func (s *Sandbox) archive(ctx context.Context, action map[string]any, stdin bool) (*ExecHandle, error) {
	target, err := sandboxPath(s.Name(), "/archive")
	if err != nil {
		return nil, err
	}
	first := map[string]any{"type": "archive", "archive": map[string]any{"user": copyUser, "action": action}}
	return s.client.session(ctx, target, first, stdin)
}

// found is what is at a path, links followed.
type found int

const (
	nothing found = iota
	file
	directory
)

// place says in which directory a copy is made and under which name; without one the directory itself is filled.
func place(source string, isDirectory bool, destination string, kind found) (string, string, error) {
	refuse := func(code Code, why string) (string, string, error) {
		return "", "", failure(code, nil, "cannot copy to '%s': %s", destination, why)
	}
	switch {
	case kind == directory:
		return destination, baseName(source), nil
	case kind == file && isDirectory:
		return refuse("path_exists", "a file is there, and the source is a directory")
	case kind == nothing && !isDirectory && strings.HasSuffix(destination, "/"):
		return refuse("path_not_found", "the directory does not exist")
	}
	name := baseName(destination)
	if name == "" {
		return refuse("path_not_found", "it does not exist")
	}
	folder := strings.TrimSuffix(strings.TrimRight(destination, "/"), name)
	return orDot(folder), name, nil
}

func baseName(path string) string {
	trimmed := strings.TrimRight(path, "/")
	name := trimmed[strings.LastIndexByte(trimmed, '/')+1:]
	if name == "." || name == ".." {
		return ""
	}
	return name
}

// destination is a path with a link in its last component followed, and what is there.
func (f *Fs) destination(ctx context.Context, target string) (string, found, error) {
	for range linksMax {
		attributes, err := f.Lstat(ctx, target)
		switch {
		case errors.Is(err, ErrPathNotFound):
			return target, nothing, nil
		case err != nil:
			return "", nothing, err
		case attributes.IsDir():
			return target, directory, nil
		case !attributes.IsSymlink():
			return target, file, nil
		}
		linked, err := f.Readlink(ctx, target)
		if err != nil {
			return "", nothing, err
		}
		if !strings.HasPrefix(linked, "/") {
			linked = path.Join("/", path.Dir(strings.TrimRight(target, "/")), linked)
		}
		target = linked
	}
	return "", nothing, failure("file_failed", nil, "'%s' leads through too many symbolic links", target)
}

// counted counts what is written through it.
type counted struct {
	io.Writer
	bytes *uint64
}

func (c counted) Write(data []byte) (int, error) {
	count, err := c.Writer.Write(data)
	*c.bytes += uint64(count)
	return count, err
}

// hear reads a session to its end.
func hear(handle *ExecHandle, report *CopyReport) error {
	var warnings []byte
	for event, err := range handle.Events() {
		if err != nil {
			return err
		}
		switch event := event.(type) {
		case Stderr:
			warnings = append(warnings, event.Data[:min(len(event.Data), warningsLenMax-len(warnings))]...)
			report.Warnings = warningLines(warnings)
		case Exited:
			return nil
		}
	}
	return failure("exec_lost", nil, "the tar stream broke off")
}

func warningLines(text []byte) []string {
	return slices.DeleteFunc(strings.Split(string(text), "\n"), func(line string) bool { return line == "" })
}

// archiveReader is the tar stream of a session; io.EOF comes only after its whole end.
type archiveReader struct {
	handle   *ExecHandle
	report   *CopyReport
	rest     []byte
	warnings []byte
	over     bool
}

func (r *archiveReader) Read(into []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.over {
			return 0, io.EOF
		}
		event, err := r.handle.Next()
		if err != nil {
			return 0, err
		}
		switch event := event.(type) {
		case Stdout:
			r.rest = event.Data
			r.report.Bytes += uint64(len(event.Data))
		case Stderr:
			r.warnings = append(r.warnings, event.Data[:min(len(event.Data), warningsLenMax-len(r.warnings))]...)
			r.report.Warnings = warningLines(r.warnings)
		case Exited:
			r.over = true
		case nil:
			return 0, failure("exec_lost", nil, "the tar stream broke off")
		}
	}
	count := copy(into, r.rest)
	r.rest = r.rest[count:]
	return count, nil
}

// pack writes a tree whose root gets this name in the stream.
func pack(into io.Writer, source, name string, leftOut *[]string) error {
	archive := tar.NewWriter(into)
	err := filepath.WalkDir(source, func(place string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(source, place)
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		member := name
		if relative != "." {
			member += "/" + relative
		}
		linked := ""
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			if linked, err = os.Readlink(place); err != nil {
				return err
			}
		case !info.IsDir() && !info.Mode().IsRegular():
			*leftOut = append(*leftOut, member+": no file, directory or link; left out")
			return nil
		}
		header, err := tar.FileInfoHeader(info, linked)
		if err != nil {
			return err
		}
		header.Name, header.Format, header.Uid, header.Gid, header.Uname, header.Gname = member, tar.FormatPAX, 0, 0, "", ""
		if info.IsDir() {
			header.Name += "/"
		}
		if err := archive.WriteHeader(header); err != nil || !info.Mode().IsRegular() {
			return err
		}
		content, err := os.Open(place)
		if err != nil {
			return err
		}
		defer content.Close()
		_, err = io.Copy(archive, content)
		return err
	})
	return errors.Join(err, archive.Close())
}

// unpack makes the tree of a stream beneath a directory, and nothing else: a name that is free gets everything at once, at the end; what is
// there is filled file by file. os.Root keeps every link from leading out of it.
func unpack(root *os.Root, stream io.Reader, name string) error {
	base := ""
	if name != "" {
		if _, err := root.Lstat(name); errors.Is(err, fs.ErrNotExist) {
			base = ".msb-copy-" + rand.Text()
			if err := root.Mkdir(base, 0o700); err != nil {
				return err
			}
			defer root.RemoveAll(base)
		}
	}
	var folders []*tar.Header
	archive := tar.NewReader(stream)
	for {
		header, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return tarError(err)
		}
		place, err := inside(base, header.Name, name)
		if err != nil {
			return err
		}
		if place == "" {
			continue
		}
		if err := unpackOne(root, archive, header, place, base, name); err != nil {
			return err
		}
		if header.Typeflag == tar.TypeDir {
			header.Name = place
			folders = append(folders, header)
		}
	}
	if _, err := io.Copy(io.Discard, stream); err != nil {
		return err
	}
	// Last, and the deepest first: a mode may forbid what comes after it, and every new entry changes a folder's time.
	for _, folder := range slices.Backward(folders) {
		if err := errors.Join(root.Chmod(folder.Name, fs.FileMode(folder.Mode&0o777)), root.Chtimes(folder.Name, folder.ModTime, folder.ModTime)); err != nil {
			return err
		}
	}
	if base != "" {
		return root.Rename(base+"/"+name, name)
	}
	return nil
}

func tarError(err error) error {
	var typed *Error
	if errors.As(err, &typed) {
		return err
	}
	return failure("invalid_archive", err, "the sandbox's tar stream cannot be understood: %v", err)
}

// inside is the place of a member; empty for the root of a stream that fills its directory.
func inside(base, member, name string) (string, error) {
	parts := slices.DeleteFunc(strings.Split(member, "/"), func(part string) bool { return part == "" || part == "." })
	wrong := strings.HasPrefix(member, "/") || slices.Contains(parts, "..") || len(member) > memberLenMax || strings.ContainsRune(member, 0)
	if wrong || (name != "" && (len(parts) == 0 || parts[0] != name)) {
		return "", failure("invalid_archive", nil, "the sandbox sent %.200q, which was not asked for", member)
	}
	return path.Join(append([]string{base}, parts...)...), nil
}

func unpackOne(root *os.Root, archive *tar.Reader, header *tar.Header, place, base, name string) (err error) {
	for folder := path.Dir(place); folder != "." && folder != base; folder = path.Dir(folder) {
		if found, err := root.Lstat(folder); err != nil || !found.IsDir() {
			return failure("path_exists", err, "a link or a file is where %.200q needs a directory", header.Name)
		}
	}
	there, err := root.Lstat(place)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if header.Typeflag == tar.TypeDir {
		switch {
		case err != nil:
			return root.Mkdir(place, 0o700)
		case !there.IsDir():
			return failure("path_exists", nil, "%s is there, and is no directory", place)
		}
		return nil
	}
	if err == nil && there.IsDir() {
		return failure("path_exists", nil, "%s is a directory", place)
	}
	temporary := fmt.Sprintf("%s.msb-%s", place, rand.Text()[:8])
	defer func() {
		if err != nil {
			root.Remove(temporary)
		}
	}()
	switch header.Typeflag {
	case tar.TypeSymlink:
		err = root.Symlink(header.Linkname, temporary)
	case tar.TypeLink:
		var linked string
		if linked, err = inside(base, header.Linkname, name); err == nil {
			err = root.Link(linked, temporary)
		}
	case tar.TypeReg, tar.TypeGNUSparse:
		err = unpackFile(root, archive, header, temporary)
	default:
		// The agent leaves devices out; one that is sent all the same is not made.
		return nil
	}
	if err != nil {
		return err
	}
	return root.Rename(temporary, place)
}

func unpackFile(root *os.Root, archive *tar.Reader, header *tar.Header, temporary string) error {
	content, err := root.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(content, archive)
	var broken *fs.PathError
	if err != nil && !errors.As(err, &broken) {
		err = tarError(err)
	}
	if err := errors.Join(err, content.Chmod(fs.FileMode(header.Mode&0o777)), content.Close()); err != nil {
		return err
	}
	return root.Chtimes(temporary, header.ModTime, header.ModTime)
}
