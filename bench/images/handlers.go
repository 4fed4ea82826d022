package images

import (
	"context"
	"fmt"
)

// Handler returns the folder of the sample Function of a Runtime, as `hearth deploy` packs it, and the handler that it is called
// by. There is none in this build.
func Handler(_ context.Context, _ Config, runtime string) (dir, handler string, err error) {
	return "", "", fmt.Errorf("sample Function: there is no Runtime %q", runtime)
}
