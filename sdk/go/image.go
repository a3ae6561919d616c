package msb

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
)

// Image holds the calls about images of the service of this environment: msb.Image.List(ctx).
var Image images

type images struct{}

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
