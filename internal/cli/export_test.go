package cli

import (
	"context"
	"io"
)

// Exec is Main without the process.
func Exec(ctx context.Context, args []string, in io.Reader, out, errs io.Writer) int {
	a := &app{args: args, lookupEnv: func(string) (string, bool) { return "", false }, in: in, out: out, err: errs}
	return a.execute(ctx)
}

// PullBar draws a pull.
var PullBar = pullBar
