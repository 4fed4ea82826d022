package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode"

	"connectrpc.com/connect"

	"github.com/hearth-serverless/hearth/internal/stack"
)

// Exit codes of hearth.
const (
	ExitOK          = 0
	ExitFailed      = 1
	ExitUsage       = 2   // wrong flags or arguments
	ExitDown        = 3   // no deployment is up, or a daemon of it does not answer
	ExitClientError = 4   // invoke: the function answered 4xx; others: no such function
	ExitServerError = 5   // invoke: the function answered 5xx
	ExitInterrupted = 130 // by Ctrl-C
)

// usageError is what the user can mend by other words on the command line.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// httpError is an answer of a Function that is none.
type httpError struct {
	function   string
	code       int
	status     string
	retryAfter string
}

func (e *httpError) Error() string {
	if e.retryAfter != "" {
		return fmt.Sprintf("the answer is %s; try again in %s s", e.status, e.retryAfter)
	}
	if e.code >= 500 {
		return fmt.Sprintf("the answer is %s; see `hearth logs %s`", e.status, e.function)
	}
	return "the answer is " + e.status
}

// exitCode chooses the process's exit code.
func exitCode(err error) int {
	var usage usageError
	var answer *httpError
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &usage):
		return ExitUsage
	case errors.As(err, &answer):
		if answer.code >= 500 {
			return ExitServerError
		}
		return ExitClientError
	case errors.Is(err, context.Canceled):
		return ExitInterrupted
	case errors.Is(err, stack.ErrDown), connect.CodeOf(err) == connect.CodeUnavailable:
		return ExitDown
	case connect.CodeOf(err) == connect.CodeNotFound:
		return ExitClientError
	}
	return ExitFailed
}

// explain says what an error of a daemon means for the user, and what to do next.
func (a *app) explain(err error, doing string) error {
	var rpc *connect.Error
	if !errors.As(err, &rpc) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	next := ""
	switch rpc.Code() {
	case connect.CodeUnavailable:
		if onCluster, _ := a.onCluster(); !onCluster {
			if _, down := stack.ReadStatus(a.run); down != nil {
				return fmt.Errorf("%s: %w", doing, down)
			}
		}
		next = "; see `hearth status`"
	case connect.CodeNotFound:
		next = "; see `hearth list`"
	case connect.CodeResourceExhausted:
		next = "; see `hearth ps`, and --max and --pool-size"
	case connect.CodeInternal:
		next = "; see `hearth logs`"
	case connect.CodeCanceled:
		return fmt.Errorf("%s: %w", doing, context.Canceled)
	default:
	}
	if strings.Contains(rpc.Message(), "`hearth ") {
		next = "" // the daemon has said it
	}
	return &spoken{text: advise(doing, rpc.Message(), next), err: err}
}

// advise puts together what went wrong and what to do next. What has lines, such as a trace of a function's language, stands by
// itself, and the advice below it.
func advise(doing, reason, next string) string {
	first, rest, several := strings.Cut(strings.TrimSpace(reason), "\n")
	if !several {
		return doing + ": " + first + next
	}
	text := doing + ": " + strings.TrimRight(first, "\r") + "\n"
	for line := range strings.Lines(rest) {
		text += "  " + strings.TrimRight(line, "\r\n") + "\n"
	}
	return text + strings.TrimPrefix(next, "; ")
}

// printable is a text that can do nothing to a terminal but be read: it may come from a function, an installer or a registry.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return '\uFFFD'
	}, strings.TrimSpace(text))
}

// spoken is an error in words for the user.
type spoken struct {
	text string
	err  error
}

func (e *spoken) Error() string { return e.text }
func (e *spoken) Unwrap() error { return e.err }
