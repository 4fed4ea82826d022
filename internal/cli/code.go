package cli

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/codepack"
	"github.com/hearth-serverless/hearth/registry"
)

// codeOptions are the flags of deploy that are about code alone.
type codeOptions struct {
	runtime, handler, signature string
	registry                    string
	noDeps, noBytecode          bool
	access                      registryOptions
	flags                       *pflag.FlagSet // those that make no sense for an image
}

// signatures are the values of --signature.
func signatures() map[string]hearthv1.Signature {
	return map[string]hearthv1.Signature{
		"": hearthv1.Signature_SIGNATURE_UNSPECIFIED, "http": hearthv1.Signature_SIGNATURE_HTTP, "cloudevent": hearthv1.Signature_SIGNATURE_CLOUDEVENT,
	}
}

func (o *codeOptions) add(f *pflag.FlagSet) {
	o.flags = pflag.NewFlagSet("code", pflag.ContinueOnError)
	o.flags.StringVar(&o.runtime, "runtime", "", "of the code: python, node, java, native or another of 'hearth runtime ls' (default: guessed)")
	o.flags.StringVar(&o.handler, "handler", "", "what answers: MODULE.FUNCTION (python, node), a class (java), a program's path (native)")
	o.flags.StringVar(&o.signature, "signature", "", "how the handler wants to be called, http or cloudevent (default http)")
	o.flags.BoolVar(&o.noDeps, "no-deps", false, "do not install what requirements.txt or package-lock.json names")
	o.flags.BoolVar(&o.noBytecode, "no-bytecode", false, "do not compile the code for its runtime: the package is smaller, starts take longer")
	f.AddFlagSet(o.flags)
	f.StringVar(&o.registry, "registry", "", "HOST[:PORT][/PATH] for code, which is pushed as code/NAME (default: that of 'hearth up --registry' or 'hearth install --registry')")
	o.access.add(f)
}

// complete teaches shells the values of the flags.
func (o *codeOptions) complete(a *app, c *cobra.Command) {
	_ = c.RegisterFlagCompletionFunc("runtime", a.completeRuntime)
	_ = c.RegisterFlagCompletionFunc("signature", cobra.FixedCompletions([]string{"http", "cloudevent"}, cobra.ShellCompDirectiveNoFileComp))
}

// given are the flags for code that were set.
func (o *codeOptions) given() (names []string) {
	o.flags.VisitAll(func(f *pflag.Flag) {
		if f.Changed {
			names = append(names, "--"+f.Name)
		}
	})
	return names
}

func (o *codeOptions) validate() error {
	if _, ok := signatures()[o.signature]; !ok {
		return usagef("--signature %q: use http or cloudevent", o.signature)
	}
	return checkRegistry(o.registry)
}

// checkRegistry checks the value of --registry, which may be empty.
func checkRegistry(registry string) error {
	host, _, _ := strings.Cut(registry, "/")
	if registry != "" && host != "localhost" && !strings.ContainsAny(host, ".:") || strings.Contains(registry, "://") {
		return usagef("--registry %q: want HOST[:PORT][/PATH], like 127.0.0.1:5000 or registry.example/team", registry)
	}
	return nil
}

// deployCode packs and pushes code for a Function, and says what runs it, and by which Runtime.
func (a *app) deployCode(ctx context.Context, name, path string, o *codeOptions) (runtimeName string, _ *hearthv1.Code, err error) {
	tree, err := codepack.Open(path, codepack.Limits{})
	if err != nil {
		return "", nil, err
	}
	defer tree.Close()
	runtimeName, language, err := o.choose(tree)
	if err != nil {
		return "", nil, usageError{err}
	}
	handler, err := tree.Handler(language, o.handler)
	if err != nil {
		return "", nil, usageError{err}
	}
	if language == codepack.Native {
		if err := tree.CheckProgram(handler, runtime.GOARCH); err != nil {
			return "", nil, err
		}
	}
	rt, err := a.findRuntime(ctx, runtimeName)
	if err != nil {
		return "", nil, err
	}
	repository, err := a.codeRepository(ctx, name, o)
	if err != nil {
		return "", nil, err
	}
	if i := tree.Installer(language); i != nil && !o.noDeps {
		err := a.patiently(ctx, fmt.Sprintf("installing what %s names, with %s", i.File, i.Program), true, i.Install)
		if err != nil {
			return "", nil, interrupted(ctx, err)
		}
	}
	if !o.noBytecode {
		if err := a.compile(ctx, tree, rt, language); err != nil {
			return "", nil, err
		}
	}
	ref, err := a.pushCode(ctx, tree, repository, runtimeName, handler, o)
	if err != nil {
		return "", nil, err
	}
	return runtimeName, &hearthv1.Code{Package: ref, Handler: handler, Signature: signatures()[o.signature]}, nil
}

// compile adds to code what its Runtime would otherwise make of it at each start. The code runs without it too: what keeps it from being
// made is told, and no error. The version is that of the Runtime's own interpreter; what is of another would not be used.
func (a *app) compile(ctx context.Context, tree *codepack.Tree, rt *hearthv1.Runtime, guess string) error {
	language, version, booted := strings.Cut(rt.GetStatus().GetLanguage(), " ")
	if !booted {
		if tree.Compiles(guess) {
			a.note("The package has no bytecode, so that each start compiles the code: which version runtime %s has is known when it has booted once (deploy again then)", rt.GetName())
		}
		return nil
	}
	c := tree.Compiler(language, version)
	if c == nil {
		return nil
	}
	err := a.patiently(ctx, fmt.Sprintf("compiling %s for %s", plural(c.Sources, "file"), c.Version), true, c.Compile)
	if ctx.Err() != nil {
		return interrupted(ctx, ctx.Err())
	}
	if err != nil {
		a.note("The package has no bytecode, so that each start compiles the code: %s", printable(err.Error()))
	}
	return nil
}

// choose says by which Runtime code runs, and which of those that Hearth knows that is like, if any.
func (o *codeOptions) choose(tree *codepack.Tree) (runtimeName, language string, err error) {
	if slices.Contains([]string{codepack.Python, codepack.Node, codepack.Java, codepack.Native}, o.runtime) {
		return o.runtime, o.runtime, nil
	}
	guess, err := tree.Guess()
	if o.runtime != "" {
		return o.runtime, guess, nil // a user's own: whatever is in it
	}
	return guess, guess, err
}

// codeRepository is where a Function's code is pushed to.
func (a *app) codeRepository(ctx context.Context, name string, o *codeOptions) (string, error) {
	if o.registry != "" {
		return strings.TrimSuffix(o.registry, "/") + "/code/" + name, nil
	}
	d, err := a.deployment()
	if err != nil {
		return "", err
	}
	host, err := d.Registry(ctx)
	if err != nil {
		return "", a.explain(err, "find the registry for the code")
	}
	if host == "" {
		return "", usagef("there is no registry for the code: name one by --registry (or for all: `hearth up --registry` on a machine, `hearth install --registry` on a cluster)")
	}
	return strings.TrimSuffix(host, "/") + "/code/" + name, nil
}

func (a *app) pushCode(ctx context.Context, tree *codepack.Tree, repository, runtimeName, handler string, o *codeOptions) (ref string, err error) {
	client, err := o.access.client()
	if err != nil {
		return "", err
	}
	defer client.Close()
	var packed *codepack.Package
	var done atomic.Int64
	err = a.withProgress("packing", tree.Bytes(), &done, func() (err error) {
		packed, err = tree.Pack(ctx, runtimeName, handler, &done)
		return err
	})
	if err != nil {
		return "", interrupted(ctx, err)
	}
	defer packed.Close()
	done.Store(0)
	err = a.withProgress("pushing", packed.Size(), &done, func() (err error) {
		ref, err = packed.Push(ctx, client, repository, &done)
		return err
	})
	if err != nil {
		return "", explainPush(ctx, err, repository)
	}
	a.note("code: %s, %s, packed for %s into %s at %s", plural(tree.Files(), "file"), megabytes(tree.Bytes()), runtimeName, megabytes(packed.Size()), ref)
	return ref, nil
}

// explainPush adds what the user can do about a registry that does not take what is pushed.
func explainPush(ctx context.Context, err error, repository string) error {
	if errors.Is(err, registry.ErrUnauthorized) {
		return explainRegistry(ctx, err)
	}
	return interrupted(ctx, &spoken{text: err.Error() + "; may this machine push to " + repository + "? Another registry is named by --registry", err: err})
}
