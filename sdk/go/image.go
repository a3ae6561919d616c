package msb

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
)

// Image holds the calls about images of the service of this environment: msb.Image.List(ctx).
var Image images

type images struct{}

// Pull fetches an image from its registry; progress, if it is not nil, hears each step. A pull that is cancelled is taken up by the next one.
func (images) Pull(ctx context.Context, reference string, progress func(PullEvent)) (*ImageHandle, error) {
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.PullImage(ctx, PullRequest{Reference: reference}, progress)
}

// Save saves images as one docker archive. The file is there whole or not at all.
func (images) Save(ctx context.Context, path string, references ...string) error {
	client, err := Connect(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	archive, err := client.SaveImages(ctx, "docker", references...)
	if err != nil {
		return err
	}
	defer archive.Close()
	return writeWhole(ctx, archive, path)
}

// Tag gives an image another name.
func (images) Tag(ctx context.Context, reference, name string) (*ImageHandle, error) {
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.TagImage(ctx, reference, name)
}

// Prune removes the images that nothing needs and that are not pinned.
func (images) Prune(ctx context.Context) (*ImagePruneReport, error) {
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.PruneImages(ctx, PruneRequest{})
}

// Load loads a docker or OCI archive.
func (images) Load(ctx context.Context, archive string) ([]ImageHandle, error) {
	file, err := os.Open(archive)
	if err != nil {
		code := Code("path_not_found")
		if errors.Is(err, os.ErrPermission) {
			code = "permission_denied"
		}
		return nil, failure(code, err, "%v", err)
	}
	defer file.Close()
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.LoadImage(ctx, file)
}

// List gives every image, newest first.
func (images) List(ctx context.Context) ([]ImageHandle, error) {
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.Images(ctx)
}

// Get gives one image.
func (images) Get(ctx context.Context, reference string) (*ImageHandle, error) {
	detail, err := Image.Inspect(ctx, reference)
	if err != nil {
		return nil, err
	}
	return &detail.ImageHandle, nil
}

// Inspect gives everything about one image.
func (images) Inspect(ctx context.Context, reference string) (*ImageDetail, error) {
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.InspectImage(ctx, reference)
}

// Remove removes an image; force untags it even where sandboxes use it.
func (images) Remove(ctx context.Context, reference string, force bool) error {
	client, err := Connect(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	return client.RemoveImage(ctx, reference, force)
}

// LoadImage loads an archive (docker or OCI, also compressed) into the store.
func (c *Client) LoadImage(ctx context.Context, archive io.Reader) ([]ImageHandle, error) {
	type loadEvent struct {
		Type   string        `json:"type"`
		Images []ImageHandle `json:"images"`
		Error  apiError      `json:"error"`
	}
	// The reader is hidden behind its interface, so that nothing but us closes it.
	body := struct{ io.Reader }{archive}
	for event, err := range lines[loadEvent](ctx, c, http.MethodPost, "/v1/images/load", body, "application/x-tar") {
		switch {
		case err != nil:
			return nil, err
		case event.Type == "done":
			return event.Images, nil
		case event.Type == "error":
			return nil, event.Error.typed()
		}
	}
	return nil, failure("daemon_unavailable", nil, "the load ended without an answer")
}

// PullRequest says what to fetch and how.
type PullRequest struct {
	// Reference is [registry/]name[:tag][@digest].
	Reference string `json:"reference"`
	// Platform is as linux/amd64; the host's if empty.
	Platform string `json:"platform,omitempty"`
	// Credentials are used in place of every stored one.
	Credentials *Credentials `json:"credentials,omitempty"`
	// Insecure allows plain HTTP, and certificates that nobody vouches for.
	Insecure bool `json:"insecure,omitempty"`
}

// Credentials are a name and a secret for a registry.
type Credentials struct {
	Username string `json:"username"`
	Password string `json:"password"`
}

// PruneRequest says what a prune may take.
type PruneRequest struct {
	// DryRun changes nothing, only reports.
	DryRun bool `json:"dry_run,omitempty"`
	// All takes pinned images too.
	All bool `json:"all,omitempty"`
	// OlderThanMS leaves images that were loaded or used within these milliseconds.
	OlderThanMS uint64 `json:"older_than_ms,omitempty"`
	// KeepBytes ends it when what stays is no more than this; the least recently used go first.
	KeepBytes *uint64 `json:"keep_bytes,omitempty"`
	// Labels are terms that all must fit.
	Labels []string `json:"labels,omitempty"`
}

// PullImage fetches an image; progress, if it is not nil, hears each step.
func (c *Client) PullImage(ctx context.Context, request PullRequest, progress func(PullEvent)) (*ImageHandle, error) {
	text, err := json.Marshal(request)
	if err != nil {
		return nil, failure("invalid_request", err, "%v", err)
	}
	for event, err := range lines[PullEvent](ctx, c, http.MethodPost, "/v1/images/pull", bytes.NewReader(text), "application/json") {
		switch {
		case err != nil:
			return nil, err
		case event.Type == "error" && event.Error != nil:
			return nil, event.Error.typed()
		}
		if progress != nil {
			progress(event)
		}
		if event.Type == "done" {
			return event.Image, nil
		}
	}
	return nil, failure("daemon_unavailable", nil, "the pull ended without an answer")
}

// SaveImages gives images as one archive, in the layout docker or oci; it is whole only if it ends without an error. Close it.
func (c *Client) SaveImages(ctx context.Context, format string, references ...string) (io.ReadCloser, error) {
	text, err := json.Marshal(map[string]any{"references": references, "format": format})
	if err != nil {
		return nil, failure("invalid_request", err, "%v", err)
	}
	response, err := c.send(ctx, http.MethodPost, "/v1/images/save", bytes.NewReader(text), "application/json")
	if err != nil {
		return nil, err
	}
	return response.Body, nil
}

// TagImage gives an image another name.
func (c *Client) TagImage(ctx context.Context, reference, name string) (*ImageHandle, error) {
	var handle ImageHandle
	request := map[string]string{"reference": reference, "name": name}
	if err := c.call(ctx, http.MethodPost, "/v1/images/tag", request, &handle); err != nil {
		return nil, err
	}
	return &handle, nil
}

// PinImage keeps prune from an image, or no more.
func (c *Client) PinImage(ctx context.Context, reference string, pinned bool) (*ImageHandle, error) {
	var handle ImageHandle
	request := map[string]any{"reference": reference, "pinned": pinned}
	if err := c.call(ctx, http.MethodPost, "/v1/images/pin", request, &handle); err != nil {
		return nil, err
	}
	return &handle, nil
}

// PruneImages removes the images that the request allows and nothing needs.
func (c *Client) PruneImages(ctx context.Context, request PruneRequest) (*ImagePruneReport, error) {
	var report ImagePruneReport
	if err := c.call(ctx, http.MethodPost, "/v1/images/prune", request, &report); err != nil {
		return nil, err
	}
	return &report, nil
}

// Images gives every image, newest first.
func (c *Client) Images(ctx context.Context) ([]ImageHandle, error) {
	var list struct {
		Images []ImageHandle `json:"images"`
	}
	err := c.call(ctx, http.MethodGet, "/v1/images", nil, &list)
	return list.Images, err
}

// InspectImage gives everything about one image.
func (c *Client) InspectImage(ctx context.Context, reference string) (*ImageDetail, error) {
	var detail ImageDetail
	path := withQuery("/v1/image", url.Values{"reference": {reference}})
	if err := c.call(ctx, http.MethodGet, path, nil, &detail); err != nil {
		return nil, err
	}
	return &detail, nil
}

// RemoveImage removes an image.
func (c *Client) RemoveImage(ctx context.Context, reference string, force bool) error {
	query := forced(force)
	query.Set("reference", reference)
	return c.call(ctx, http.MethodDelete, withQuery("/v1/image", query), nil, nil)
}
