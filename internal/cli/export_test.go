package cli

import (
	"context"
	"io"
)

// Exec is Main without the process.
func Exec(ctx context.Context, args []string, in io.Reader, out, errs io.Writer) int {
	return ExecEnv(ctx, "hearth", nil, args, in, out, errs)
}

// ExecEnv is Exec by the name of a program, with an environment.
func ExecEnv(ctx context.Context, program string, env map[string]string, args []string, in io.Reader, out, errs io.Writer) int {
	name, args := called(append([]string{program}, args...))
	lookup := func(key string) (string, bool) {
		value, ok := env[key]
		return value, ok
	}
	a := &app{name: name, args: args, lookupEnv: lookup, in: in, out: out, err: errs}
	return a.execute(ctx)
}

// PullBar draws a pull.
var PullBar = pullBar
