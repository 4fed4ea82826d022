package instance

import (
	"context"
	"errors"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
)

// connectError gives an error the code that its kind has in NodeService; one that has a code keeps it.
func connectError(err error) error {
	if err == nil {
		return nil
	}
	if coded := (*connect.Error)(nil); errors.As(err, &coded) {
		return err
	}
	code := connect.CodeInternal
	switch {
	case errors.Is(err, context.DeadlineExceeded), errdefs.IsDeadlineExceeded(err):
		code = connect.CodeDeadlineExceeded
	case errors.Is(err, context.Canceled), errdefs.IsCanceled(err):
		code = connect.CodeCanceled
	case errdefs.IsUnavailable(err):
		code = connect.CodeUnavailable
	case errdefs.IsInvalidArgument(err):
		code = connect.CodeInvalidArgument
	case errdefs.IsNotFound(err):
		code = connect.CodeNotFound
	case errdefs.IsFailedPrecondition(err):
		code = connect.CodeFailedPrecondition
	case errdefs.IsResourceExhausted(err):
		code = connect.CodeResourceExhausted
	}
	return connect.NewError(code, err)
}
