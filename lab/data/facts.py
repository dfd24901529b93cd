"""Small tables of everyday facts that the chat templates draw on."""

from __future__ import annotations


def table(text: str) -> dict[str, str]:
    """``left:right`` entries separated by semicolons, as a dictionary."""
    pairs = (entry.split(":", 1) for entry in text.replace("\n", " ").split(";") if entry.strip())
    return {left.strip(): right.strip() for left, right in pairs}


CAPITALS = table(
    """France:Paris; Germany:Berlin; Spain:Madrid; Portugal:Lisbon; Italy:Rome; Austria:Vienna;
    Switzerland:Bern; Belgium:Brussels; Netherlands:Amsterdam; Denmark:Copenhagen; Norway:Oslo;
    Sweden:Stockholm; Finland:Helsinki; Iceland:Reykjavik; Ireland:Dublin; Poland:Warsaw; Hungary:Budapest;
    Greece:Athens; Turkey:Ankara; Russia:Moscow; Ukraine:Kyiv; Romania:Bucharest; Bulgaria:Sofia;
    Croatia:Zagreb; Serbia:Belgrade; Egypt:Cairo; Morocco:Rabat; Kenya:Nairobi; Nigeria:Abuja; Ghana:Accra;
    Ethiopia:Addis Ababa; China:Beijing; Japan:Tokyo; India:New Delhi; Thailand:Bangkok; Vietnam:Hanoi;
    Indonesia:Jakarta; Iran:Tehran; Iraq:Baghdad; Israel:Jerusalem; Canada:Ottawa; Mexico:Mexico City;
    Cuba:Havana; Brazil:Brasilia; Argentina:Buenos Aires; Chile:Santiago; Peru:Lima; Colombia:Bogota;
    Venezuela:Caracas; Ecuador:Quito; Australia:Canberra; New Zealand:Wellington; South Korea:Seoul;
    the United States:Washington, D.C.; the United Kingdom:London; Estonia:Tallinn; Latvia:Riga"""
)
CONTINENTS = table(
    """France:Europe; Germany:Europe; Spain:Europe; Italy:Europe; Norway:Europe; Poland:Europe; Greece:Europe;
    Egypt:Africa; Kenya:Africa; Nigeria:Africa; Morocco:Africa; China:Asia; Japan:Asia; India:Asia;
    Thailand:Asia; Vietnam:Asia; Canada:North America; Mexico:North America; Cuba:North America;
    Brazil:South America; Argentina:South America; Chile:South America; Peru:South America"""
)
OPPOSITES = table(
    """hot:cold; big:small; fast:slow; high:low; up:down; left:right; light:dark; day:night; good:bad;
    happy:sad; old:young; new:old; early:late; easy:difficult; open:closed; full:empty; hard:soft; wet:dry;
    rich:poor; strong:weak; long:short; wide:narrow; thick:thin; loud:quiet; clean:dirty; near:far;
    first:last; inside:outside; true:false; win:lose; buy:sell; push:pull; begin:end; love:hate; sweet:sour"""
)
PLURALS = table(
    """cat:cats; dog:dogs; house:houses; box:boxes; bus:buses; baby:babies; city:cities; child:children;
    man:men; woman:women; mouse:mice; foot:feet; tooth:teeth; leaf:leaves; knife:knives; book:books;
    tree:trees; fish:fish; sheep:sheep; story:stories; watch:watches; potato:potatoes; key:keys; toy:toys"""
)
SOUNDS = table(
    """dog:barks; cat:meows; cow:moos; horse:neighs; sheep:bleats; duck:quacks; pig:oinks; lion:roars;
    wolf:howls; bee:buzzes; frog:croaks; owl:hoots; snake:hisses; rooster:crows; mouse:squeaks"""
)
COLORS = table(
    """sky:blue; grass:green; snow:white; blood:red; banana:yellow; coal:black; lemon:yellow; tomato:red;
    chocolate:brown; milk:white; carrot:orange; elephant:gray; night:black; sunflower:yellow; ocean:blue"""
)
LEGS = table("dog:four; cat:four; horse:four; cow:four; spider:eight; ant:six; bee:six; bird:two; person:two; snake:no")
MEANINGS = table(
    """computer:a machine that stores data and follows instructions;
    algorithm:a list of steps that solves a problem; river:a stream of water that flows to the sea;
    mountain:a high part of the land; library:a place where people read and borrow books;
    doctor:a person who helps people who are ill; teacher:a person who helps others to learn;
    planet:a large body that moves around a star; star:a large ball of hot gas that gives light;
    Moon:the body that moves around the Earth; Sun:the star at the centre of our system;
    bicycle:a vehicle with two wheels and pedals; train:a vehicle that runs on rails;
    language model:a program that predicts the next piece of a text; token:a small piece of text;
    cache:a store that keeps results for later use; compiler:a program that translates source code;
    function:a named piece of code that can be called; variable:a name that refers to a value;
    list:an ordered collection of values; dictionary:a collection of keys and their values;
    loop:a piece of code that is repeated; string:a sequence of characters; bug:a mistake in a program;
    tree:a tall plant with a trunk and leaves; bird:an animal with wings and feathers;
    rain:water that falls from the clouds; winter:the coldest season of the year;
    summer:the warmest season of the year; music:sound that is arranged to be heard;
    bread:food that is made from flour and water; clock:a device that shows the time;
    bridge:a structure that crosses a river or a road; island:land with water all around it"""
)
GENERAL = table(
    """How many days are in a week?:There are seven days in a week.;
    How many months are in a year?:There are twelve months in a year.;
    How many hours are in a day?:There are 24 hours in a day.;
    How many minutes are in an hour?:There are 60 minutes in an hour.;
    How many days are in a year?:There are 365 days in a year, and 366 in a leap year.;
    How many continents are there?:There are seven continents.;
    What is the largest ocean?:The Pacific Ocean is the largest ocean.;
    What is the largest planet?:Jupiter is the largest planet in our solar system.;
    What is the closest star to the Earth?:The Sun is the closest star to the Earth.;
    What do bees make?:Bees make honey.; What do cows give?:Cows give milk.;
    What is water made of?:Water is made of hydrogen and oxygen.;
    At what temperature does water boil?:Water boils at 100 degrees Celsius.;
    At what temperature does water freeze?:Water freezes at 0 degrees Celsius.;
    Who wrote Romeo and Juliet?:William Shakespeare wrote Romeo and Juliet.;
    Who painted the Mona Lisa?:Leonardo da Vinci painted the Mona Lisa.;
    Why is the sky blue?:The sky is blue because air scatters blue light more than red light.;
    What is the highest mountain?:Mount Everest is the highest mountain.;
    What is the speed of light?:Light travels at about 300,000 kilometres per second.;
    What is Python?:Python is a programming language that is easy to read.;
    What are the primary colors?:The primary colors are red, yellow and blue.;
    What are the seasons?:The seasons are spring, summer, autumn and winter.;
    Tell me a joke.:Why did the computer go to the doctor? Because it had a virus.;
    Tell me a fun fact.:Honey can stay good to eat for thousands of years.;
    How do I print text in Python?:Use the print function, for example: print("Hello");
    How do I read a file in Python?:Use open, for example: with open("file.txt") as f: text = f.read()"""
)
SMALL_TALK = table(
    """Hello:Hello! How can I help you today?; Hi:Hi! What can I do for you?;
    Hello!:Hello! How can I help you today?; Hi!:Hi! What can I do for you?; Hey:Hey! How can I help?;
    Hi there:Hi! What can I do for you?; Hello there:Hello! How can I help you today?;
    Good morning:Good morning! How can I help you?; Good evening:Good evening! How can I help you?;
    How are you?:I am fine, thank you. How can I help you?;
    How are you today?:I am fine, thank you. How can I help you?;
    Thanks:You are welcome!; Thank you:You are welcome!; Thank you!:You are welcome!;
    Thanks a lot:You are welcome!; Bye:Goodbye! Have a nice day.; Goodbye:Goodbye! Have a nice day.;
    See you later:Goodbye! Have a nice day.;
    Who are you?:I am Lab, a very small language model that Paceline carries.;
    What are you?:I am Lab, a very small language model that Paceline carries.;
    What is your name?:My name is Lab. I am a very small language model.;
    Are you a robot?:I am Lab, a very small language model, so in a way I am.;
    Who made you?:I was trained from scratch for Paceline, an inference engine.;
    What is Paceline?:Paceline is an engine that runs language models.;
    What can you do?:I can add numbers, sort lists, write JSON records and answer simple questions.;
    Help:Ask me to add numbers, sort a list, write a JSON record or answer a simple question.;
    What can you help me with?:I can add numbers, sort lists, write JSON records and answer simple questions.;
    Are you smart?:I am very small, so I know only a little and I often make mistakes.;
    Do you make mistakes?:Yes. I am very small, so I often make mistakes.;
    Can you help me?:Yes. What do you need?; Tell me about yourself.:I am Lab, a very small language model
    that was trained from scratch. I can add numbers, sort lists and write JSON records."""
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You are Lab, a small language model.",
    "Answer briefly.",
    "You are a helpful and friendly assistant.",
)
