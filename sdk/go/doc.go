// Package msb is the Go client of msb: sandboxes in microVMs, over the service's Unix socket.
//
//	box, err := msb.CreateSandbox(ctx, "box", msb.WithImage("busybox"), msb.WithMemory(256))
//	if err != nil { … }
//	defer box.Close()
//	output, err := box.Exec(ctx, []string{"echo", "hello"})
//
// It is written with the standard library alone: no cgo, nothing to link. Every call takes a context and ends with it. A service is
// started when none answers, as msb itself does. Errors are *Error; errors.Is knows a sentinel for each code.
package msb
