package daemon

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// maxConfigBytes bounds a configuration file.
const maxConfigBytes = 1 << 20

// EnvName is the environment variable of a flag: HEARTH_LOG_LEVEL for log-level.
func EnvName(flag string) string {
	return "HEARTH_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// Configure completes flags that were parsed from the command line: what is not set there comes from the environment, then
// from the file that the flag "config" names, if there is such a flag. A key of the file that is no flag is an error.
func Configure(flags *pflag.FlagSet, lookupEnv func(string) (string, bool)) error {
	if err := ConfigureFromEnv(flags, lookupEnv); err != nil {
		return err
	}
	file := flags.Lookup("config")
	if file == nil || file.Value.String() == "" {
		return nil
	}
	given := map[string]bool{"config": true, "help": true, "version": true}
	flags.Visit(func(f *pflag.Flag) { given[f.Name] = true })
	return applyFile(flags, file.Value.String(), given)
}

// ConfigureFromEnv is Configure without the file, for programs whose "config" is something else.
func ConfigureFromEnv(flags *pflag.FlagSet, lookupEnv func(string) (string, bool)) error {
	var errs []error
	flags.VisitAll(func(f *pflag.Flag) {
		value, ok := lookupEnv(EnvName(f.Name))
		if !ok || f.Changed || f.Name == "help" || f.Name == "version" {
			return
		}
		if err := flags.Set(f.Name, value); err != nil {
			errs = append(errs, fmt.Errorf("environment variable %s: %w", EnvName(f.Name), err))
		}
	})
	return errors.Join(errs...)
}

func applyFile(flags *pflag.FlagSet, path string, given map[string]bool) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("configuration file: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err != nil {
		return fmt.Errorf("configuration file %s: %w", path, err)
	}
	if err := applyConfig(flags, data, given); err != nil {
		return fmt.Errorf("configuration file %s: %w", path, err)
	}
	return nil
}

// applyConfig sets flags from a YAML (so also JSON) mapping of flag names to values, leaving out those in given.
func applyConfig(flags *pflag.FlagSet, data []byte, given map[string]bool) error {
	if len(data) > maxConfigBytes {
		return fmt.Errorf("is larger than %d bytes", maxConfigBytes)
	}
	var document yaml.Node
	if err := yaml.Unmarshal(data, &document); err != nil {
		return err
	}
	if len(document.Content) == 0 {
		return nil
	}
	root := document.Content[0]
	if root.Kind != yaml.MappingNode {
		return errors.New("must be a mapping of flag names to values")
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(root.Content); i += 2 {
		key, value := root.Content[i], root.Content[i+1]
		name := key.Value
		if flags.Lookup(name) == nil || name == "config" || name == "help" || name == "version" {
			return fmt.Errorf("line %d: unknown key %q: keys are the names of flags, see --help", key.Line, name)
		}
		if seen[name] {
			return fmt.Errorf("line %d: key %q is there twice", key.Line, name)
		}
		seen[name] = true
		if given[name] {
			continue
		}
		if err := setFlag(flags, name, value); err != nil {
			return fmt.Errorf("line %d: key %q: %w", value.Line, name, err)
		}
	}
	return nil
}

// setFlag sets one flag from a scalar, a list of scalars, or a mapping of scalars (as KEY=VALUE).
func setFlag(flags *pflag.FlagSet, name string, value *yaml.Node) error {
	values, err := scalars(value)
	if err != nil {
		return err
	}
	if list, ok := flags.Lookup(name).Value.(pflag.SliceValue); ok && value.Kind == yaml.SequenceNode {
		flags.Lookup(name).Changed = true
		return list.Replace(values)
	}
	if value.Kind == yaml.SequenceNode {
		return errors.New("takes one value, not a list")
	}
	for _, v := range values {
		if err := flags.Set(name, v); err != nil {
			return err
		}
	}
	return nil
}

func scalars(value *yaml.Node) ([]string, error) {
	errKind := errors.New("wants a plain value, a list or a mapping of plain values")
	if value.Kind == yaml.ScalarNode {
		if value.Tag == "!!null" {
			return nil, errors.New("has no value")
		}
		return []string{value.Value}, nil
	}
	if value.Kind != yaml.SequenceNode && value.Kind != yaml.MappingNode {
		return nil, errKind // an alias: of no use here, and a way to blow up
	}
	for _, n := range value.Content {
		if n.Kind != yaml.ScalarNode {
			return nil, errKind
		}
	}
	var out []string
	if value.Kind == yaml.SequenceNode {
		for _, n := range value.Content {
			out = append(out, n.Value)
		}
		return out, nil
	}
	for i := 0; i+1 < len(value.Content); i += 2 {
		out = append(out, value.Content[i].Value+"="+value.Content[i+1].Value)
	}
	return out, nil
}
